"""What the torch engine asks of a model: hold weights, keep one cache row per running sequence, compute logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from trainer.checkpoint.folder import mismatches


class Decoder(Protocol):
    """Rows are numbered 0..n-1 without holes: the engine moves the last row into the place of one that ended, so
    every step works on the first n rows."""

    vocab_size: int
    max_positions: int

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Installs a full set of weights under checkpoint names. Raises ValueError that lists every missing,
        unexpected and misshapen tensor; the cache rows are kept."""
        ...

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """What `load` installed."""
        ...

    def reserve(self, rows: int, context: int, completion: int) -> None:
        """Makes room for `rows` sequences of at most `context` tokens, of which `decode` appends at most
        `completion`. Never less than before; what rows hold is kept."""
        ...

    def release(self) -> None:
        """Frees weights and caches. `load` and `reserve` come before anything else again."""
        ...

    def prefill(self, contexts: list[np.ndarray], rows: list[list[int]]) -> Float[Tensor, "contexts vocab"]:
        """Reads each context once, keeps it for every row in `rows[i]` and returns the logits after its last token."""
        ...

    def decode(self, tokens: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> Float[Tensor, "n vocab"]:
        """Appends `tokens[r]` at `positions[r]` to row r, for rows 0..n-1, and returns the logits after it."""
        ...

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` was; `source` is free."""
        ...

    def draw(
        self, logits: Float[Tensor, "n vocab"], temperature: Float[np.ndarray, " n"], noise: Float64[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """rollout.torch.sampler.draw, or something faster that computes the same."""
        ...

    def logits(self, sequences: list[np.ndarray]) -> Float[Tensor, "tokens vocab"]:
        """The logits after every token of every sequence, one after the other, without touching a cache row."""
        ...


def raise_mismatches(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """ValueError listing all `mismatches`, if there are any."""
    lines = mismatches(expected, found)
    if lines:
        shown = "\n  ".join(lines[:40]) + (f"\n  and {len(lines) - 40} more" if len(lines) > 40 else "")
        raise ValueError(f"these weights do not fit the model the engine was started with:\n  {shown}")


def pack(sequences: list[np.ndarray]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " sequences+1"]]:
    """Sequences laid one after the other: tokens, positions within each sequence, bounds."""
    lengths = np.array([len(s) for s in sequences], np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(bounds)
