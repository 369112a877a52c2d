"""The form in which the trainer's tensors travel: as they are, with floats cast, or the weights in block-FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rollout.transport.base import Entry, Layout
from trainer.model.folder import SCALE

# None: as they are; a dtype: floats cast to it; "fp8": E4M3 in blocks of 128x128 where DeepSeek's release has them.
Payload = torch.dtype | Literal["fp8"] | None
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def travelling(layout: Layout, payload: Payload) -> tuple[Entry, ...]:
    """What travels for the trainer's tensors."""
    return tuple(entry for line in layout for entry in _travels(*line, payload))


def travelling_owners(layout: Layout, owners: Sequence[int], payload: Payload) -> tuple[int, ...]:
    """The owner of each of `travelling`."""
    return tuple(o for line, o in zip(layout, owners, strict=True) for _ in _travels(*line, payload))


def _travels(name: str, shape: Sequence[int], dtype: torch.dtype, payload: Payload) -> list[Entry]:
    if payload is not None and dtype in _FLOATS and not name.endswith("e_score_correction_bias"):
        # A router's bias stays float32: its steps of 1e-3 are below BF16's resolution near 1.
        dtype = payload
    return [Entry(name, tuple(shape), str(dtype).removeprefix("torch."))]


def parts(entries: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    """The entries of each tensor of the trainer: one, or an FP8 weight and its scales."""
    waiting: list[Entry] = []
    for entry in entries:
        if waiting and entry.name == waiting[0].name + SCALE:
            waiting.append(entry)
            continue
        if waiting:
            yield tuple(waiting)
        waiting = [entry]
    if waiting:
        yield tuple(waiting)


def put(tensors: Sequence[Tensor], places: Sequence[tuple[Tensor, ...]], payload: Payload) -> None:
    """Writes each tensor to where it travels."""
    torch._foreach_copy_([place for (place,) in places], list(tensors), non_blocking=False)
