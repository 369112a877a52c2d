"""Multi-head latent attention (DeepSeek-V3 technical report, section 2.1.1), over packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trainer.model.config import V3Config
from trainer.model.documents import Documents, pad, unpad
from trainer.model.layers import Linear, RMSNorm
from trainer.model.rope import apply_rope, softmax_scale
from trainer.precision.recipe import Recipe

# DeepSeek's code and transformers fix the epsilon of the two latent norms; vLLM takes `rms_norm_eps`. They are the
# same in every published V3 model.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """Queries and keys have a part without position (`nope`) and a rotated one (`pe`); the rotated key is shared by
    all heads. Names are those of DeepSeek's inference code."""

    def __init__(self, config: V3Config, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.wq = Linear(hidden, heads * config.qk_head_dim, recipe)
        else:
            self.wq_a = Linear(hidden, config.q_lora_rank, recipe)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.wq_b = Linear(config.q_lora_rank, heads * config.qk_head_dim, recipe)
        self.wkv_a = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, recipe)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.wkv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), recipe)
        self.wo = Linear(heads * config.v_head_dim, hidden, recipe)
        self.scale = softmax_scale(config)

    def forward(
        self,
        x: Float[Tensor, "n hidden"],
        cos: Float[Tensor, "n pairs"],
        sin: Float[Tensor, "n pairs"],
        documents: Documents,
    ) -> Float[Tensor, "n hidden"]:
        c, heads = self.config, self.config.num_attention_heads
        q = self.wq(x) if c.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x)))
        q_nope, q_pe = q.view(-1, heads, c.qk_head_dim).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        kv, k_pe = self.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.wkv_b(self.kv_norm(kv)).view(-1, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        q_pe = apply_rope(q_pe, cos, sin, c.rope_interleave)
        k_pe = apply_rope(k_pe[:, None], cos, sin, c.rope_interleave)
        q = torch.cat((q_nope, q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe.expand(-1, heads, -1)), dim=-1)
        return self.wo(causal_attention(q, k, v, documents, self.scale).flatten(1))


def causal_attention(
    q: Float[Tensor, "n heads qk"],
    k: Float[Tensor, "n heads qk"],
    v: Float[Tensor, "n heads v"],
    documents: Documents,
    scale: float,
) -> Float[Tensor, "n heads v"]:
    """softmax(scale · q kᵀ) v of every token over its document up to itself."""
    q, k, v = pad(q, documents), pad(k, documents), pad(v, documents)
    out, start = [], 0
    for count, length in documents.groups:
        end = start + count * length
        grouped = (t[start:end].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v))
        out.append(_causal(*grouped, scale).transpose(1, 2).flatten(0, 1))
        start = end
    return unpad(torch.cat(out) if len(out) > 1 else out[0], documents)


def _causal(
    q: Float[Tensor, "d heads length qk"],
    k: Float[Tensor, "d heads length qk"],
    v: Float[Tensor, "d heads length v"],
    scale: float,
) -> Float[Tensor, "d heads length v"]:
    width = v.shape[-1]
    if width != q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]
