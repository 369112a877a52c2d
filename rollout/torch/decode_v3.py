"""DeepSeek-V3 decoding with torch operators: any device, any dtype, read straight from checkpoint tensors.

Notation of the V3 report (arXiv 2412.19437, section 2.1): latent c = RMSNorm(W_DKV h), shared rotary key k_R, per-head
keys W_UK c and values W_UV c. `cache="latent"` keeps (c, k_R) and absorbs W_UK into the query and W_UV into the
output, as DeepSeek serves it; `cache="expanded"` keeps per-head keys and values. They are the same function; `auto`
takes the one with fewer floats per token, which is also the one with less work per cached token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rollout.torch import sampler
from rollout.torch.decoder import pack, raise_mismatches
from trainer.model.attention import LATENT_NORM_EPS
from trainer.model.moe import select_experts
from trainer.model.rope import rotation, softmax_scale
from trainer.model.v3_config import V3Config


def expected_shapes(c: V3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every checkpoint tensor decoding needs (the MTP layer is not among them)."""
    h, heads = c.hidden_size, c.num_attention_heads
    shapes = {"model.embed_tokens.weight": (c.vocab_size, h), "model.norm.weight": (h,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, h)

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, h)
        shapes[f"{prefix}.down_proj.weight"] = (h, width)

    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        queries = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        if c.q_lora_rank is None:
            shapes[f"{attention}.q_proj.weight"] = (queries, h)
        else:
            shapes[f"{attention}.q_a_proj.weight"] = (c.q_lora_rank, h)
            shapes[f"{attention}.q_a_layernorm.weight"] = (c.q_lora_rank,)
            shapes[f"{attention}.q_b_proj.weight"] = (queries, c.q_lora_rank)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (c.kv_lora_rank + c.qk_rope_head_dim, h)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        shapes[f"{attention}.kv_b_proj.weight"] = (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        shapes[f"{attention}.o_proj.weight"] = (h, heads * c.v_head_dim)
        if i < c.first_k_dense_replace:
            mlp(f"{layer}.mlp", c.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (c.n_routed_experts, h)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        for e in range(c.n_routed_experts):
            mlp(f"{layer}.mlp.experts.{e}", c.moe_intermediate_size)
        if c.n_shared_experts:
            mlp(f"{layer}.mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
    return shapes


def latent_is_smaller(c: V3Config) -> bool:
    """Whether a token's latent takes fewer floats than its per-head keys and values (the rotated key is in both)."""
    return c.kv_lora_rank < c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)


def collect(c: V3Config, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A private copy of the tensors decoding needs, checked against `expected_shapes`. Router biases stay float32."""
    expected = expected_shapes(c)
    extra_layer = re.compile(r"model\.layers\.(\d+)\.")
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        layer = extra_layer.match(name)
        if layer and c.num_hidden_layers <= int(layer[1]) < c.num_hidden_layers + c.num_nextn_predict_layers:
            continue  # the MTP layer, which plain decoding does not use
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        keep = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        found[name] = tensor.detach().to(device=device, dtype=keep, copy=True)
    raise_mismatches(expected, {name: tuple(t.shape) for name, t in found.items()})
    return found


def route(
    x: Float[Tensor, "n hidden"], weight: Float[Tensor, "experts hidden"], bias: Float[Tensor, " experts"], c: V3Config
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Weights and indices of the chosen experts, in float32: sigmoid affinities, the bias only selects
    (V3 report, equations 12-16)."""
    scores = F.linear(x.float(), weight.float()).sigmoid()  # [n, experts]
    chosen = select_experts(scores + bias, c.n_group, c.topk_group, c.num_experts_per_tok)
    picked = scores.gather(1, chosen)
    if c.norm_topk_prob:
        picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
    return picked * c.routed_scaling_factor, chosen


def rotate(x: Float[Tensor, "... rope"], cos: Float[Tensor, ...], sin: Float[Tensor, ...]) -> Tensor:
    """Rotates the halves of the last dimension against each other (interleaved checkpoints are reordered at load)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Layer:
    """Tensors of one layer in the form the products want them."""

    def __init__(self, c: V3Config, w: dict[str, Tensor], i: int, latent: bool):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        nope, rope, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
        order = torch.arange(rope)
        if c.rope_interleave:  # pairs (0,1), (2,3), ... become halves: the same rotation, contiguous
            order = torch.cat([order[0::2], order[1::2]])
        order = order.to(w[f"{attention}.o_proj.weight"].device)

        def reorder_queries(q: Tensor) -> Tensor:
            q = q.view(heads, nope + rope, -1)
            return torch.cat([q[:, :nope], q[:, nope:][:, order]], dim=1).flatten(0, 1)

        kv_a = w[f"{attention}.kv_a_proj_with_mqa.weight"]
        kv_a = torch.cat([kv_a[: c.kv_lora_rank], kv_a[c.kv_lora_rank :][order]])
        self.q_lora = c.q_lora_rank
        if c.q_lora_rank is None:
            first = reorder_queries(w[f"{attention}.q_proj.weight"])
        else:
            first = w[f"{attention}.q_a_proj.weight"]
            self.q_norm = w[f"{attention}.q_a_layernorm.weight"]
            self.q_b = reorder_queries(w[f"{attention}.q_b_proj.weight"])
        self.first = torch.cat([first, kv_a])  # [queries or q_lora, + kv_lora + rope; hidden]
        self.first_split = [len(first), c.kv_lora_rank, rope]
        self.kv_norm = w[f"{attention}.kv_a_layernorm.weight"]
        self.kv_b = w[f"{attention}.kv_b_proj.weight"]  # [heads * (nope + v), kv_lora]
        if latent:
            up = self.kv_b.view(heads, nope + c.v_head_dim, c.kv_lora_rank)
            self.w_uk, self.w_uv = up[:, :nope].contiguous(), up[:, nope:].transpose(1, 2).contiguous()
        self.o = w[f"{attention}.o_proj.weight"]
        self.norm1, self.norm2 = w[f"{layer}.input_layernorm.weight"], w[f"{layer}.post_attention_layernorm.weight"]
        self.moe = i >= c.first_k_dense_replace
        dense = f"{layer}.mlp.shared_experts" if self.moe else f"{layer}.mlp"
        self.has_dense = not self.moe or bool(c.n_shared_experts)
        if self.has_dense:
            self.gate_up = torch.cat([w[f"{dense}.gate_proj.weight"], w[f"{dense}.up_proj.weight"]])
            self.down = w[f"{dense}.down_proj.weight"]
        if self.moe:
            self.router, self.bias = w[f"{layer}.mlp.gate.weight"], w[f"{layer}.mlp.gate.e_score_correction_bias"]
            experts = [f"{layer}.mlp.experts.{e}" for e in range(c.n_routed_experts)]
            self.experts_gate_up = torch.stack(
                [torch.cat([w[f"{e}.gate_proj.weight"], w[f"{e}.up_proj.weight"]]) for e in experts]
            )  # [experts, 2 * width, hidden]
            self.experts_down = torch.stack([w[f"{e}.down_proj.weight"] for e in experts])  # [experts, hidden, width]


def _swiglu(x: Float[Tensor, "n hidden"], gate_up: Tensor, down: Tensor) -> Float[Tensor, "n hidden"]:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class V3Decoder:
    """Keeps the protocol of rollout.torch.decoder.Decoder for the V3 architecture."""

    def __init__(
        self,
        config: V3Config,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        cache: Literal["auto", "latent", "expanded"] = "auto",
        keep_routing: bool = False,
    ):
        """`keep_routing`: every row remembers the experts its tokens were sent to, see `routing`."""
        c = self.config = config
        self.vocab_size, self.max_positions = c.vocab_size, c.max_position_embeddings
        self.dtype, self.device = dtype, device
        self.latent = latent_is_smaller(c) if cache == "auto" else cache == "latent"
        self.scale = softmax_scale(c)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._routed: list[Tensor] = []  # of [rows, 1, context, moe_layers, k], where routing is kept
        self._chosen: list[Tensor] | None = [] if keep_routing else None  # [n, k] of each layer of the pass that runs
        self._raw: dict[str, Tensor] = {}
        self._layers: list[_Layer] = []

    # weights

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._raw = collect(self.config, weights, self.dtype, self.device)
        self._embedding = self._raw["model.embed_tokens.weight"]
        self._head = self._embedding if self.config.tie_word_embeddings else self._raw["lm_head.weight"]
        self._norm = self._raw["model.norm.weight"]
        self._layers = [_Layer(self.config, self._raw, i, self.latent) for i in range(self.config.num_hidden_layers)]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._raw.items()

    # cache rows

    def reserve(self, rows: int, context: int, completion: int) -> None:
        c = self.config
        cos, sin = rotation(c, torch.arange(context, device=self.device))
        self._cos, self._sin = cos.to(self.dtype), sin.to(self.dtype)  # [context, rope / 2]
        heads = c.num_attention_heads
        if self.latent:
            self._keys = self._grow(self._keys, (rows, 1, context, c.kv_lora_rank + c.qk_rope_head_dim))
        else:
            self._keys = self._grow(self._keys, (rows, heads, context, c.qk_nope_head_dim + c.qk_rope_head_dim))
            self._values = self._grow(self._values, (rows, heads, context, c.v_head_dim))
        if self._chosen is not None:
            shape = (rows, 1, context, c.moe_layers, c.num_experts_per_tok)
            self._routed = self._grow(self._routed, shape, 1, torch.int16)

    def _grow(
        self, caches: list[Tensor], shape: tuple[int, ...], count: int | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        grown = []
        for i in range(self.config.num_hidden_layers if count is None else count):
            grown.append(torch.zeros(shape, dtype=dtype or self.dtype, device=self.device))
            if caches:
                old, caches[i] = caches[i], caches[i].new_empty(0)  # freed layer by layer
                grown[i][: old.shape[0], :, : old.shape[2]] = old
        return grown

    def release(self) -> None:
        self._keys, self._values, self._routed, self._raw, self._layers = [], [], [], {}, []
        self._embedding = self._head = self._norm = None

    def move(self, source: int, target: int) -> None:
        for cache in self._keys + self._values + self._routed:
            cache[target] = cache[source]

    def routing(self, row: int, tokens: int) -> Int[np.ndarray, "tokens moe_layers k"]:
        """The experts that the first `tokens` tokens of a row went to, int16, as the pass that read each chose them."""
        return self._routed[0][row, 0, :tokens].cpu().numpy()

    def _take_routing(self) -> Int[Tensor, "n moe_layers k"] | None:
        """What the layers of the pass that just ran chose."""
        if not self._chosen:
            return None
        taken = torch.stack(self._chosen, dim=1).to(torch.int16)
        self._chosen.clear()
        return taken

    # the model

    draw = staticmethod(sampler.draw)

    @torch.inference_mode()
    def prefill(self, contexts: list[np.ndarray], rows: list[list[int]]) -> Float[Tensor, "contexts vocab"]:
        tokens, positions, bounds = (t.to(self.device) for t in pack(contexts))
        hidden = self._forward(tokens, positions, bounds, rows)
        return self._logits(hidden[bounds[1:] - 1])

    @torch.inference_mode()
    def logits(self, sequences: list[np.ndarray]) -> Float[Tensor, "tokens vocab"]:
        return self._logits(self._forward(*(t.to(self.device) for t in pack(sequences)), None))

    @torch.inference_mode()
    def decode(self, tokens: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Float[Tensor, "n vocab"]:
        at = torch.from_numpy(positions).to(self.device)
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=self.device)[None] <= at[:, None]  # [n, length]
        x = F.embedding(torch.from_numpy(tokens).to(self.device), self._embedding)
        cos, sin = self._cos[at], self._sin[at]
        attend = self._decode_latent if self.latent else self._decode_expanded
        for i, layer in enumerate(self._layers):
            x = x + F.linear(attend(i, layer, self._norm_rows(x, layer.norm1), cos, sin, at, visible), layer.o)
            x = x + self._mlp(layer, self._norm_rows(x, layer.norm2))
        if (routed := self._take_routing()) is not None:
            self._routed[0][torch.arange(len(at), device=self.device), 0, at] = routed
        return self._logits(x)

    def _norm_rows(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps if eps is None else eps)

    def _logits(self, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
        return F.linear(self._norm_rows(x, self._norm), self._head).float()

    def _project(
        self, layer: _Layer, x: Float[Tensor, "n hidden"], cos: Tensor, sin: Tensor
    ) -> tuple[Float[Tensor, "n heads nope"], Float[Tensor, "n heads rope"], Float[Tensor, "n lora"], Tensor]:
        """Queries (position-free and rotated), normed latent and rotated shared key of every token."""
        c = self.config
        q, latent, key = F.linear(x, layer.first).split(layer.first_split, dim=-1)
        if layer.q_lora is not None:
            q = F.linear(self._norm_rows(q, layer.q_norm, LATENT_NORM_EPS), layer.q_b)
        q = q.reshape(len(x), c.num_attention_heads, -1)
        nope, rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent = self._norm_rows(latent, layer.kv_norm, LATENT_NORM_EPS)
        return nope, rotate(rope, cos[:, None], sin[:, None]), latent, rotate(key, cos, sin)

    def _expand(self, layer: _Layer, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, nope + rope] and values [n, heads, v] of every token."""
        c = self.config
        up = F.linear(latent, layer.kv_b).view(len(latent), c.num_attention_heads, -1)
        nope, value = up.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return torch.cat([nope, key[:, None].expand(-1, c.num_attention_heads, -1)], dim=-1), value

    def _forward(
        self, tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"], bounds: Int[Tensor, " d+1"], rows: list | None
    ) -> Float[Tensor, "n hidden"]:
        """Hidden states (before the final norm) of packed sequences; keeps sequence d for every row of rows[d]."""
        x = F.embedding(tokens, self._embedding)
        longest = int(bounds.diff().max())
        document = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=x.device), bounds.diff())
        if rows is not None:
            target = torch.tensor([r for group in rows for r in group], device=x.device)
            source = torch.tensor([d for d, group in enumerate(rows) for _ in group], device=x.device)
        cos, sin = (t.to(self.dtype) for t in rotation(self.config, positions))
        for i, layer in enumerate(self._layers):
            nope, rope, latent, key = self._project(layer, self._norm_rows(x, layer.norm1), cos, sin)
            keys, values = self._expand(layer, latent, key)

            def pad(t: Tensor) -> Tensor:  # [n, ...] -> [documents, longest, ...]
                return t.new_zeros(len(bounds) - 1, longest, *t.shape[1:]).index_put((document, positions), t)

            q = pad(torch.cat([nope, rope], dim=-1)).transpose(1, 2)
            k, v = pad(keys).transpose(1, 2), pad(values).transpose(1, 2)
            # Padding stands at the end, where no causal query of a real token looks.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            x = x + F.linear(out.transpose(1, 2)[document, positions].flatten(1), layer.o)
            x = x + self._mlp(layer, self._norm_rows(x, layer.norm2))
            if rows is not None and self.latent:
                self._keys[i][target, 0, :longest] = pad(torch.cat([latent, key], dim=-1))[source]
            elif rows is not None:
                self._keys[i][target, :, :longest], self._values[i][target, :, :longest] = k[source], v[source]
        routed = self._take_routing()
        if rows is not None and routed is not None:
            self._routed[0][target, 0, :longest] = pad(routed)[source]
        return x

    def _decode_expanded(
        self, i: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, visible: Tensor
    ) -> Float[Tensor, "n heads*v"]:
        n, length = len(x), visible.shape[1]
        nope, rope, latent, key = self._project(layer, x, cos, sin)
        keys, values = self._expand(layer, latent, key)
        row = torch.arange(n, device=x.device)
        self._keys[i][row, :, at], self._values[i][row, :, at] = keys, values
        # Written out: with values narrower than keys, scaled_dot_product_attention would scale a copy of the cache.
        q = (torch.cat([nope, rope], dim=-1) * self.scale)[:, :, None]  # [n, heads, 1, nope + rope]
        scores = (q @ self._keys[i][:n, :, :length].transpose(-1, -2)).float()  # [n, heads, 1, length]
        scores = scores.masked_fill_(~visible[:, None, None], float("-inf")).softmax(-1).to(x.dtype)
        return (scores @ self._values[i][:n, :, :length]).flatten(1)

    def _decode_latent(
        self, i: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, visible: Tensor
    ) -> Float[Tensor, "n heads*v"]:
        n, length = len(x), visible.shape[1]
        nope, rope, latent, key = self._project(layer, x, cos, sin)
        self._keys[i][torch.arange(n, device=x.device), 0, at] = torch.cat([latent, key], dim=-1)
        cache = self._keys[i][:n, 0, :length]  # [n, length, lora + rope]
        absorbed = torch.bmm(nope.transpose(0, 1), layer.w_uk).transpose(0, 1)  # [n, heads, lora]
        scores = torch.bmm(torch.cat([absorbed, rope], dim=-1), cache.transpose(1, 2)).float() * self.scale
        scores = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).to(x.dtype)
        mixed = torch.bmm(scores, cache[..., : self.config.kv_lora_rank])  # [n, heads, lora]
        return torch.bmm(mixed.transpose(0, 1), layer.w_uv).transpose(0, 1).flatten(1)

    def _mlp(self, layer: _Layer, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        out = _swiglu(x, layer.gate_up, layer.down) if layer.has_dense else torch.zeros_like(x)
        if not layer.moe:
            return out
        weights, chosen = route(x, layer.router, layer.bias, self.config)
        if self._chosen is not None:
            self._chosen.append(chosen)
        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, sorted by expert
        token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=self.config.n_routed_experts).tolist()
        parts = [
            _swiglu(part, layer.experts_gate_up[e], layer.experts_down[e])
            for e, part in enumerate(x[token].split(counts))
            if len(part)
        ]
        routed = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)  # [n, k, hidden]
        return out + torch.einsum("nkh,nk->nh", routed, weights.to(x.dtype))
