"""Decoding of causal LMs that transformers loads and that keep plain key-value caches (Llama, Qwen, Mistral, ...)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rollout.torch import sampler
from rollout.torch.decoder import raise_mismatches
from trainer.checkpoint.model_folder import attention_windows
from trainer.hf_model import TOLERANCE, hold_rotation, load_config, load_model, named_tensors


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
    """Keeps the protocol of rollout.torch.decoder.Decoder for a transformers model. `longest`: see
    trainer.hf_model.load_model."""

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        longest: int | None = None,
    ):
        config = load_config(path)
        text = config.get_text_config()
        self.windows = attention_windows(text.to_dict())
        self.vocab_size, self.max_positions = text.vocab_size, text.max_position_embeddings
        self.dtype, self.device, self.longest = dtype, device, longest
        # SDPA would leave out a softcap of the scores without a word.
        softcap = getattr(text, "attn_logit_softcapping", None)
        attention = None if softcap is None else "eager"
        model = load_model(path, config, longest, dtype=dtype, attn_implementation=attention)
        self.attention = model.config.get_text_config()._attn_implementation
        self.model = self._frozen(model)
        self._kind, self._config = type(model), config
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.weights()}
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._check(path)

    def _check(self, path: str | Path) -> None:
        """Raises ValueError where a token read with cached keys and values has other logits than without a cache: the
        model keeps something else, or places its tokens by other means than positions and masks."""
        sequences = [np.arange(1, 1 + n, dtype=np.int64) % self.vocab_size for n in (6, 9)]
        self.reserve(len(sequences), 16, 1)
        try:
            self.prefill([s[:-1] for s in sequences], [[i] for i in range(len(sequences))])
            found = self.decode(np.array([s[-1] for s in sequences]), np.array([len(s) - 1 for s in sequences]))
            ends = np.cumsum([len(s) for s in sequences]) - 1
            apart = (found.log_softmax(-1) - self.logits(sequences)[ends].log_softmax(-1)).abs().mean().item()
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: the torch engine cannot decode a {self._config.model_type} model ({error}). Use the vllm "
                "engine"
            ) from error
        if not apart <= TOLERANCE[self.dtype]:
            raise ValueError(
                f"{path}: the torch engine computes a {self._config.model_type} model wrongly: with its cache log p is "
                f"{apart:.2g} nats from the model's own. Use the vllm engine"
            )
        self._keys, self._values = [], []

    # weights

    def _frozen(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.eval().requires_grad_(False).to(self.device)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        given = {name: tensor.detach().clone() for name, tensor in weights}
        raise_mismatches(self._shapes, {name: tuple(t.shape) for name, t in given.items() if name not in self._tied})
        # Through transformers, which alone knows how a checkpoint's tensors are fused in its modules.
        model = self._kind.from_pretrained(
            None, config=self._config, dtype=self.dtype, attn_implementation=self.attention, state_dict=given
        )
        self.model = self._frozen(hold_rotation(model, self.longest))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.model is None:
            return
        self._tied = set(self.model.all_tied_weights_keys)
        yield from named_tensors(self.model)

    # cache rows

    @torch.inference_mode()
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

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        for cache in self._keys + self._values:
            cache[target] = cache[source]

    # the model

    draw = staticmethod(sampler.draw)

    def _read(self, sequences: list[np.ndarray]) -> tuple[Float[Tensor, "sequences longest vocab"], DynamicCache]:
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
        out = self.model(
            input_ids=torch.from_numpy(tokens).to(self.device)[:, None],
            position_ids=at[:, None],
            attention_mask=self._masks(at, length),
            past_key_values=_Rows(self._keys, self._values, at, length),
            use_cache=True,
        )
        return out.logits[:, 0].float()

    def _masks(self, at: Int[Tensor, " n"], length: int) -> Tensor | dict[str, Tensor]:
        """Which of `length` cached tokens the tokens at positions `at` see: [n, 1, 1, length], one for each kind of
        layer where there are several. Eager attention adds its mask to the scores."""
        back = at[:, None] - torch.arange(length, device=self.device)[None]  # [n, length]
        masks = {}
        for kind, window in self.windows.items():
            visible = ((back >= 0) & (back < (window or length)))[:, None, None]
            hidden = torch.finfo(self.dtype).min
            masks[kind] = torch.where(visible, 0.0, hidden).to(self.dtype) if self.attention == "eager" else visible
        return masks if len(masks) > 1 else next(iter(masks.values()))
