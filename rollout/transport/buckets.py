"""Tensors laid side by side in buffers of bounded size: what the transports between processes send at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from rollout.transport.base import Entry

ALIGNMENT = 64  # bytes; every tensor starts on one
BUCKET_BYTES = 256 << 20


@dataclass
class Bucket:
    """Items of one bucket, and the byte at which each begins."""

    items: list = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def fill(sized: Iterable[tuple[object, int]], bucket_bytes: int) -> Iterator[Bucket]:
    """Puts (item, bytes) into buckets in order. A new one begins where the next item does not fit; an item larger than
    `bucket_bytes` has a bucket to itself."""
    bucket = Bucket()
    for item, size in sized:
        if bucket.items and bucket.nbytes + size > bucket_bytes:
            yield bucket
            bucket = Bucket()
        bucket.items.append(item)
        bucket.offsets.append(bucket.nbytes)
        bucket.nbytes += -(-size // ALIGNMENT) * ALIGNMENT
    if bucket.items:
        yield bucket


def payload_dtype(name: str, dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """How a tensor travels: as it is, or floats as `asked`. A router's bias stays float32: its steps of 1e-3 are below
    BF16's resolution near 1."""
    if asked is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return dtype
    return dtype if name.endswith("e_score_correction_bias") else asked


def buckets_of(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, payload: torch.dtype | None
) -> Iterator[Bucket]:
    """Buckets of (name, tensor, dtype it travels in)."""

    def sized() -> Iterator[tuple[tuple[str, Tensor, torch.dtype], int]]:
        for name, tensor in tensors:
            dtype = payload_dtype(name, tensor.dtype, payload)
            yield (name, tensor.detach(), dtype), nbytes(tensor.shape, dtype)

    return fill(sized(), bucket_bytes)  # type: ignore[arg-type]


def buckets_of_entries(entries: Sequence[Entry], bucket_bytes: int) -> list[Bucket]:
    """The same buckets as `buckets_of` makes, of the manifest's entries."""
    return list(fill(((e, nbytes(e.shape, getattr(torch, e.dtype))) for e in entries), bucket_bytes))


class Window:
    """Typed views of one buffer. They are made once: syncs repeat with the same shapes at the same places."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer  # uint8
        self._views: dict[tuple, Tensor] = {}

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = (offset, shape, dtype)
        found = self._views.get(key)
        if found is None:
            flat = self.buffer[offset : offset + nbytes(shape, dtype)]
            found = self._views[key] = flat.view(dtype).view(shape)
        return found

    def pack(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """Copies the (name, tensor, dtype) of `bucket` into the buffer, cast where dtypes differ; returns the copies
        under their names."""
        placed = [
            self.view(offset, tuple(tensor.shape), dtype)
            for (_, tensor, dtype), offset in zip(bucket.items, bucket.offsets, strict=True)
        ]
        sources = [tensor for _, tensor, _ in bucket.items]
        torch._foreach_copy_(placed, sources, non_blocking=False)
        return [(name, view) for (name, _, _), view in zip(bucket.items, placed, strict=True)]

    def unpack(self, bucket: Bucket) -> list[Tensor]:
        """Views of the tensors that the entries of `bucket` describe."""
        return [
            self.view(offset, entry.shape, getattr(torch, entry.dtype))
            for entry, offset in zip(bucket.items, bucket.offsets, strict=True)
        ]
