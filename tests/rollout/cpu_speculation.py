"""What vLLM's CPU build (0.32.0) lacks for speculative decoding, put right for tests: so the path of the drafts, from
checkpoint names to log-probabilities, runs where no GPU is. The engine itself refuses speculation there, for the build
computes nonsense without an error: MLA's kernel takes one query token, and several are read as if nothing stood before
them; and the temperatures, spread over the drafted tokens, are written into a copy that is then dropped."""

from __future__ import annotations


def install() -> None:
    """Changes the vLLM of this process, before an engine starts."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder, QueryLenSupport
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
    from vllm.v1.sample import rejection_sampler

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """Each query token is a row of its own for the kernel, with as much context as it may see."""
        q = (torch.cat(q, dim=-1) if isinstance(q, tuple) else q).contiguous()
        decode = attn_metadata.decode
        each = len(q) // len(decode.seq_lens)  # query tokens of a request, the last of which sees all
        later = torch.arange(each - 1, -1, -1, dtype=torch.int32).repeat(len(decode.seq_lens))
        lengths = decode.seq_lens.to(torch.int32).repeat_interleave(each) - later
        blocks = decode.block_table.to(torch.int32).repeat_interleave(each, 0)
        out = torch.zeros(len(q), q.shape[1], self.kv_lora_rank, dtype=q.dtype)
        ops.mla_decode_kvcache_cpu(out, q, kv_c_and_k_pe_cache, self.scale, blocks, lengths.clamp(min=0))
        return out, None

    def expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts)

    MLACommonMetadataBuilder.query_len_support = QueryLenSupport.UNIFORM
    CPUMLAImpl.forward_mqa = forward_mqa
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
