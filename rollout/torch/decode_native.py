"""DeepSeek-V3 decoding on a CPU in float32 through the C++ in rollout/torch/native.

Per-head keys and values are kept (`cache="expanded"` of decode_v3.py): for models small enough for a CPU they
are smaller than the latent and less work per cached token. Sequences that were admitted with the same context share
one copy of its cache. A token's logits have the same bits in every batch, and in prefill and decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from rollout.torch.decode_v3 import collect
from rollout.torch.native import library
from trainer.model.attention import LATENT_NORM_EPS
from trainer.model.rope import rotation, softmax_scale
from trainer.model.v3_config import V3Config

# `Sequence` of v3.cpp
_SEQUENCE = np.dtype(
    [(name, np.uint64) for name in ("prefix_keys", "prefix_values", "keys", "values")]
    + [(name, np.int64) for name in ("prefix_key_stride", "prefix_value_stride", "key_stride", "value_stride")]
    + [(name, np.int32) for name in ("prefix", "first_token", "tokens", "position", "logits", "first_logit")],
    align=True,
)
_OF_ROW = ("prefix_keys", "prefix_values", "prefix_key_stride", "prefix_value_stride", "prefix", "keys", "values")


@dataclass
class _Cache:
    """Keys [layers, blocks, heads * nope + rope, lanes] and values [layers, positions, heads * padded v]."""

    keys: Tensor
    values: Tensor
    length: int = 0


def _pad(x: Float[Tensor, "rows k"], to: int) -> Float[Tensor, "padded k"]:
    return F.pad(x, (0, 0, 0, -len(x) % to))


class NativeDecoder:
    """Keeps the protocol of rollout.torch.decoder.Decoder for the V3 architecture in float32 on a CPU."""

    def __init__(self, config: V3Config, *, threads: int | None = None):
        self.config = config
        self.vocab_size, self.max_positions = config.vocab_size, config.max_position_embeddings
        self.threads = threads
        self._library = library.load()
        self._lanes = self._library.vector_lanes()
        c = config
        outputs = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        folded, apart = c.hidden_size * (c.hidden_size // 2 + outputs), c.kv_lora_rank * (c.hidden_size + outputs)
        # W_UK and W_UV times W_DKV as one product, when that is less work than two. What is lost is the norm between
        # them, 1 / rms(W_DKV x); the triangle R of W_DKV = QR gives it: |R x| = |W_DKV x|.
        self._fold = c.kv_lora_rank >= c.hidden_size and folded < apart
        self._raw: dict[str, Tensor] = {}
        self._forget()

    # weights

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        c = self.config
        raw = collect(c, weights, torch.float32, "cpu")
        self._packed: list[Tensor] = []  # owns what the structures point to
        layers = (library.Layer * c.num_hidden_layers)(*(self._layer(raw, i) for i in range(c.num_hidden_layers)))
        head = raw["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
        self._layers, self._raw = layers, raw
        self._model = library.Model(
            hidden=c.hidden_size, layers=c.num_hidden_layers, heads=c.num_attention_heads, nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim, value=c.v_head_dim, q_lora=c.q_lora_rank or 0, kv_lora=c.kv_lora_rank,
            vocab=c.vocab_size, experts=c.n_routed_experts, top_k=c.num_experts_per_tok, groups=c.n_group,
            top_groups=c.topk_group, normalise=c.norm_topk_prob, fold=self._fold, softmax_scale=softmax_scale(c),
            eps=c.rms_norm_eps, latent_eps=LATENT_NORM_EPS, routed_scale=c.routed_scaling_factor,
            embedding=raw["model.embed_tokens.weight"].data_ptr(),
            head=self._pack(head.double() * raw["model.norm.weight"].double()),
        )  # fmt: skip
        self._tables = (torch.zeros(0, 0), torch.zeros(0, 0))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._raw.items()

    def _keep(self, x: Tensor) -> int:
        self._packed.append(x.float().contiguous())
        return self._packed[-1].data_ptr()

    def _pack(self, w: Float[Tensor, "... rows k"]) -> int:
        """[panels, k, 2 * lanes] of a weight, zeros behind its last row."""
        panel = 2 * self._lanes
        w = F.pad(w, (0, 0, 0, -w.shape[-2] % panel))
        return self._keep(w.unflatten(-2, (-1, panel)).transpose(-1, -2))

    def _pack_pairs(self, gate: Float[Tensor, "... width k"], up: Float[Tensor, "... width k"]) -> int:
        """Panels of lanes gate rows beside the same lanes of up rows."""
        split = [F.pad(w, (0, 0, 0, -w.shape[-2] % self._lanes)).unflatten(-2, (-1, self._lanes)) for w in (gate, up)]
        return self._keep(torch.cat(split, dim=-2).transpose(-1, -2))

    def _layer(self, raw: dict[str, Tensor], i: int) -> library.Layer:
        c, panel = self.config, 2 * self._lanes
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): t.double() for name, t in raw.items() if name.startswith(prefix)}
        nope, rope, v, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.num_attention_heads
        norm1, norm2 = w["input_layernorm.weight"], w["post_attention_layernorm.weight"]
        halves = torch.arange(rope)
        if c.rope_interleave:  # pairs (0, 1), (2, 3), ... become halves: the same rotation, contiguous
            halves = torch.cat([halves[0::2], halves[1::2]])

        def queries(q: Tensor) -> Tensor:  # [heads * (nope + rope), k] -> all nope, then all rope
            q = q.view(heads, nope + rope, -1)
            return torch.cat([q[:, :nope].flatten(0, 1), q[:, nope:][:, halves].flatten(0, 1)])

        layer = library.Layer(moe=i >= c.first_k_dense_replace)
        down, key = w["self_attn.kv_a_proj_with_mqa.weight"].split([c.kv_lora_rank, rope])
        up = w["self_attn.kv_b_proj.weight"].view(heads, nope + v, -1)
        up = torch.cat([up[:, :nope].flatten(0, 1), up[:, nope:].flatten(0, 1)]) * w["self_attn.kv_a_layernorm.weight"]
        if c.q_lora_rank is None:
            q = queries(w["self_attn.q_proj.weight"])
        else:
            q = w["self_attn.q_a_proj.weight"]
            layer.q_up = self._pack(queries(w["self_attn.q_b_proj.weight"]) * w["self_attn.q_a_layernorm.weight"])
        if self._fold:
            layer.root = self._pack(torch.linalg.qr(down * norm1).R)
            last = up @ down
        else:
            layer.kv_up = self._pack(up)
            last = down
        layer.first = self._pack(torch.cat([_pad(part, panel) for part in (q, key[halves], last)]) * norm1)
        out = w["self_attn.o_proj.weight"].view(-1, heads, v)
        layer.out = self._pack(F.pad(out, (0, -v % self._lanes)).flatten(1))

        dense = "mlp.shared_experts" if layer.moe else "mlp"
        layer.dense_width = c.moe_intermediate_size * c.n_shared_experts if layer.moe else c.intermediate_size
        if layer.dense_width:
            layer.gate_up = self._pack_pairs(*(w[f"{dense}.{n}_proj.weight"] * norm2 for n in ("gate", "up")))
            layer.down = self._pack(w[f"{dense}.down_proj.weight"])
        if layer.moe:
            stack = lambda n: torch.stack([w[f"mlp.experts.{e}.{n}_proj.weight"] for e in range(c.n_routed_experts)])  # noqa: E731
            layer.router = self._pack(w["mlp.gate.weight"] * norm2)
            layer.bias = self._keep(w["mlp.gate.e_score_correction_bias"])
            layer.expert_gate_up = self._pack_pairs(stack("gate") * norm2, stack("up") * norm2)
            layer.expert_down = self._pack(stack("down"))
            layer.expert_width = c.moe_intermediate_size
        return layer

    # cache rows

    def _cache(self, context: int, rows: int | None = None) -> _Cache:
        c, lanes = self.config, self._lanes
        lead = () if rows is None else (rows,)
        value = c.num_attention_heads * (-(-c.v_head_dim // lanes) * lanes)
        key = c.num_attention_heads * c.qk_nope_head_dim + c.qk_rope_head_dim
        return _Cache(
            torch.empty(*lead, c.num_hidden_layers, -(-context // lanes), key, lanes),
            torch.empty(*lead, c.num_hidden_layers, context, value),
        )

    def reserve(self, rows: int, context: int, completion: int) -> None:
        old, self._own = self._own, self._cache(completion, rows)
        slots, table, prefixes = np.arange(rows), np.zeros(rows, _SEQUENCE), [None] * rows
        if old is not None:
            n, blocks, length = old.keys.shape[0], old.keys.shape[2], old.values.shape[2]
            self._own.keys[:n, :, :blocks], self._own.values[:n, :, :length] = old.keys, old.values
            slots[:n], table[:n], prefixes[:n] = self._slots, self._table, self._prefixes
        for name in ("keys", "values"):
            own = getattr(self._own, name)
            table[name] = own.data_ptr() + slots * (own.stride(0) * own.element_size())
            table[f"{name[:-1]}_stride"] = own.stride(1)
        table["first_token"] = table["first_logit"] = np.arange(rows)
        table["tokens"] = table["logits"] = 1
        self._slots, self._table, self._prefixes = slots, table, prefixes

    def release(self) -> None:
        self._raw, self._packed, self._layers, self._model = {}, [], None, None
        self._forget()

    def _forget(self) -> None:
        self._own: _Cache | None = None  # every row's own part
        self._prefixes: list[_Cache | None] = []  # of each row
        self._slots = np.zeros(0, np.int64)  # where in _own each row lies
        self._table = np.zeros(0, _SEQUENCE)  # what a decoding step tells the library about each row

    def move(self, source: int, target: int) -> None:
        for per_row in (self._slots, *(self._table[name] for name in _OF_ROW)):
            per_row[[source, target]] = per_row[[target, source]]
        self._prefixes[target], self._prefixes[source] = self._prefixes[source], None

    # the model

    def prefill(self, contexts: list[np.ndarray], rows: list[list[int]]) -> Float[Tensor, "contexts vocab"]:
        logits, caches = self._read(contexts, every=False)
        for group, cache in zip(rows, caches, strict=True):
            for row in group:
                self._prefixes[row] = cache  # keeps it alive; freed with the last row that shares it
            for name in ("keys", "values"):
                self._table[f"prefix_{name}"][group] = getattr(cache, name).data_ptr()
                self._table[f"prefix_{name[:-1]}_stride"][group] = getattr(cache, name).stride(0)
            self._table["prefix"][group] = cache.length
        return logits

    def logits(self, sequences: list[np.ndarray]) -> Float[Tensor, "tokens vocab"]:
        return self._read(sequences, every=True)[0]

    def decode(self, tokens: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Float[Tensor, "n vocab"]:
        sequences = self._table[: len(tokens)]
        sequences["position"] = positions
        return self._run(tokens, sequences, int(positions.max()) + 1)

    def draw(
        self, logits: Float[Tensor, "n vocab"], temperature: Float[np.ndarray, " n"], noise: Float64[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        n = len(logits)
        tokens, logprobs = np.empty(n, np.int64), np.empty(n, np.float32)
        logits, temperature = logits.contiguous(), np.ascontiguousarray(temperature, np.float32)
        self._library.draw(
            n, self.vocab_size, logits.data_ptr(), temperature.ctypes.data, noise.ctypes.data, tokens.ctypes.data,
            logprobs.ctypes.data,
        )  # fmt: skip
        return tokens, logprobs

    def _read(self, contexts: list[np.ndarray], every: bool) -> tuple[Float[Tensor, "wanted vocab"], list[_Cache]]:
        lengths = np.array([len(c) for c in contexts])
        caches = [self._cache(length) for length in lengths]
        s = np.zeros(len(contexts), _SEQUENCE)
        for name in ("keys", "values"):
            s[name] = [getattr(c, name).data_ptr() for c in caches]
            s[f"{name[:-1]}_stride"] = [getattr(c, name).stride(0) for c in caches]
        s["tokens"] = lengths
        s["first_token"] = np.cumsum(lengths) - lengths
        s["logits"] = lengths if every else 1
        s["first_logit"] = s["first_token"] if every else np.arange(len(contexts))
        for cache, length in zip(caches, lengths, strict=True):
            cache.length = int(length)
        return self._run(np.concatenate(contexts), s, int(lengths.max())), caches

    def _run(self, tokens: Int[np.ndarray, " n"], sequences: np.ndarray, longest: int) -> Float[Tensor, "wanted vocab"]:
        if longest > len(self._tables[0]):
            positions = torch.arange(min(max(2 * longest, 512), max(self.max_positions, longest)))
            self._tables = tuple(t.contiguous() for t in rotation(self.config, positions))
            self._model.cos, self._model.sin = (t.data_ptr() for t in self._tables)
        logits = torch.empty(int(sequences["logits"].sum()), self.vocab_size)
        tokens = np.ascontiguousarray(tokens, np.int64)
        self._library.v3_forward(
            library.ctypes.addressof(self._model), self._layers, tokens.ctypes.data, sequences.ctypes.data,
            len(sequences), min(self.threads or torch.get_num_threads(), len(sequences)), logits.data_ptr(),
        )  # fmt: skip
        return logits
