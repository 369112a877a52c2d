"""Decoding of causal LMs that transformers loads and that keep plain key-value caches (Llama, Qwen, Mistral, ...)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from rollout.torch import sampler
from rollout.torch.decoder import raise_mismatches

disable_progress_bar()  # a bar per update would run across the display of a run

_ATTENTIONS = ("full_attention",)


class _Rows:
    """The part of transformers' cache interface that attention layers use in a decoding step: writes the new token's
    keys and values at each row's own position and returns everything up to the longest row (the mask hides the
    rest)."""

    is_compileable = False

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Int[Tensor, " n"], length: int):
        self.keys, self.values, self.positions, self.length = keys, values, positions, length
        self.rows = torch.arange(len(positions), device=positions.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        n = len(self.rows)
        self.keys[layer_idx][self.rows, :, self.positions] = key[:, :, 0]
        self.values[layer_idx][self.rows, :, self.positions] = value[:, :, 0]
        return self.keys[layer_idx][:n, :, : self.length], self.values[layer_idx][:n, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - 1


class TransformersDecoder:
    """Keeps the protocol of rollout.torch.decoder.Decoder for a transformers model. Layers with sliding windows, state
    spaces or other caches are refused."""

    def __init__(self, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.config = AutoConfig.from_pretrained(path)
        kinds = set(getattr(self.config, "layer_types", None) or _ATTENTIONS) - set(_ATTENTIONS)
        windowed = getattr(self.config, "use_sliding_window", True)
        window = getattr(self.config, "sliding_window", None) if windowed else None
        if kinds or window:
            raise ValueError(
                f"{path}: the torch engine decodes models with full attention in every layer; this one has "
                f"{sorted(kinds) or f'a sliding window of {window} tokens'}. Use the vllm engine."
            )
        self.vocab_size = self.config.vocab_size
        self.max_positions = self.config.max_position_embeddings
        self.dtype, self.device = dtype, device
        # SDPA would leave out a softcap of the scores without a word.
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        self.attention = "sdpa" if softcap is None else "eager"
        self.model = self._build(AutoModelForCausalLM, path)
        self._kind = type(self.model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.weights()}
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    # weights

    def _build(self, kind: type, path: str | Path | None, **given: dict[str, Tensor]) -> PreTrainedModel:
        model = kind.from_pretrained(
            path, config=self.config, dtype=self.dtype, attn_implementation=self.attention, **given
        )
        return model.eval().requires_grad_(False).to(self.device)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        given = {name: tensor.detach().clone() for name, tensor in weights}
        raise_mismatches(self._shapes, {name: tuple(t.shape) for name, t in given.items() if name not in self._tied})
        # Through transformers, which alone knows how a checkpoint's tensors are fused in its modules.
        self.model = self._build(self._kind, None, state_dict=given)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.model is None:
            return
        self._tied = set(self.model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self._tied}
        yield from revert_weight_conversion(self.model, state).items()

    # cache rows

    def reserve(self, rows: int, context: int, completion: int) -> None:
        self._capacity = (rows, context)
        self._keys = [self._fit(cache) for cache in self._keys]
        self._values = [self._fit(cache) for cache in self._values]

    def _fit(self, cache: Float[Tensor, "n heads context d"]) -> Float[Tensor, "rows heads capacity d"]:
        rows, context = self._capacity
        grown = cache.new_zeros(rows, cache.shape[1], context, cache.shape[3])
        n, length = min(rows, cache.shape[0]), min(context, cache.shape[2])
        grown[:n, :, :length] = cache[:n, :, :length]
        return grown

    def release(self) -> None:
        self._keys, self._values = [], []
        self.model = None

    def move(self, source: int, target: int) -> None:
        for cache in self._keys + self._values:
            cache[target] = cache[source]

    # the model

    draw = staticmethod(sampler.draw)

    def _read(self, sequences: list[np.ndarray]) -> tuple[Float[Tensor, "documents longest vocab"], DynamicCache]:
        """Logits and caches of right-padded sequences: causal attention never looks at the padding behind."""
        longest = max(len(s) for s in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = torch.as_tensor(np.asarray(sequence, np.int64))
        cache = DynamicCache()
        out = self.model(input_ids=tokens.to(self.device), past_key_values=cache, use_cache=True)
        return out.logits, cache

    @torch.inference_mode()
    def prefill(self, contexts: list[np.ndarray], rows: list[list[int]]) -> Float[Tensor, "contexts vocab"]:
        logits, cache = self._read(contexts)
        target = torch.tensor([r for group in rows for r in group], device=self.device)
        source = torch.tensor([d for d, group in enumerate(rows) for _ in group], device=self.device)
        if not self._keys:  # only now the heads' number and sizes are known
            self._keys = [self._fit(layer.keys[:0]) for layer in cache.layers]
            self._values = [self._fit(layer.values[:0]) for layer in cache.layers]
        for i, layer in enumerate(cache.layers):
            self._keys[i][target, :, : logits.shape[1]] = layer.keys[source]
            self._values[i][target, :, : logits.shape[1]] = layer.values[source]
        last = torch.tensor([len(c) - 1 for c in contexts], device=self.device)
        return logits[torch.arange(len(contexts), device=self.device), last].float()

    @torch.inference_mode()
    def logits(self, sequences: list[np.ndarray]) -> Float[Tensor, "tokens vocab"]:
        logits, _ = self._read(sequences)
        return torch.cat([row[: len(s)] for row, s in zip(logits, sequences, strict=True)]).float()

    @torch.inference_mode()
    def decode(self, tokens: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Float[Tensor, "n vocab"]:
        at = torch.from_numpy(positions).to(self.device)
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=self.device)[None] <= at[:, None]  # [n, length]
        out = self.model(
            input_ids=torch.from_numpy(tokens).to(self.device)[:, None],
            position_ids=at[:, None],
            attention_mask=visible[:, None, None],
            past_key_values=_Rows(self._keys, self._values, at, length),
            use_cache=True,
        )
        return out.logits[:, 0].float()
