"""Multi-head latent attention (DeepSeek-V3 technical report, section 2.1.1), over packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from trainer.model.documents import Documents
from trainer.model.layers import Linear, RMSNorm, has_kernels
from trainer.model.packed_attention import packed_attention
from trainer.model.rope import softmax_scale
from trainer.model.v3_config import V3Config
from trainer.precision.recipe import Recipe

# DeepSeek's code and transformers fix the epsilon of the two latent norms; vLLM takes `rms_norm_eps`. They are the
# same in DeepSeek's models. Moonlight's `rms_norm_eps` is 1e-5: there vLLM differs from its published code.
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
        self, x: Float[Tensor, "n hidden"], turn: Complex[Tensor, "n pairs"], documents: Documents
    ) -> Float[Tensor, "n hidden"]:
        c, heads = self.config, self.config.num_attention_heads
        q, kv, k_pe = self._latents(x)
        q = self.wq(x) if q is None else self.wq_b(q)
        kv = self.wkv_b(kv)
        out = packed_attention(
            q.unflatten(1, (heads, -1)), kv.unflatten(1, (heads, -1)), k_pe, turn, documents, self.scale,
            c.rope_interleave,
        )  # fmt: skip
        return self.wo(out.flatten(1))

    def _latents(
        self, x: Float[Tensor, "n hidden"]
    ) -> tuple[Float[Tensor, "n q_lora"] | None, Float[Tensor, "n kv_lora"], Float[Tensor, "n rope"]]:
        """The normed latents of queries (None without q_lora_rank) and of keys and values, and the key's part to be
        rotated."""
        c = self.config
        if not has_kernels(x):
            q = None if c.q_lora_rank is None else self.q_norm(self.wq_a(x))
            kv, k_pe = self.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
            return q, self.kv_norm(kv), k_pe
        from trainer.model.kernels.triton_norm import latent_norms

        q_weight = None if c.q_lora_rank is None else self.q_norm.weight
        if c.q_lora_rank is None:
            latents = self.wkv_a(x)
        elif self.wkv_a.recipe == "bf16":  # one product: the weights' copy costs less than a sum of two gradients
            latents = F.linear(x, torch.cat((self.wq_a.weight, self.wkv_a.weight)))
        else:
            latents = torch.cat((self.wq_a(x), self.wkv_a(x)), dim=-1)
        return latent_norms(latents, q_weight, self.kv_norm.weight, LATENT_NORM_EPS)
