"""Tensors laid side by side in buffers of bounded size: what the transports between processes send at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from rollout.transport.base import Entry, Layout
from rollout.transport.fingerprint import Reading
from rollout.transport.payload import parts, put

ALIGNMENT = 64  # bytes; every tensor starts on one
BUCKET_BYTES = 256 << 20


@dataclass(eq=False)
class Bucket:
    """Entries of one bucket and the byte at which each begins. `groups` are the entries of each tensor of the trainer:
    one, or an FP8 weight and its scales. All come from the rank `owner`; `first` is the first one's place among all."""

    owner: int = 0
    first: int = 0
    entries: list[Entry] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    groups: list[tuple[Entry, ...]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def nbytes_with_numbers(self) -> int:
        """With the fingerprints behind the tensors."""
        return self.nbytes + 8 * len(self.entries)


def nbytes(entry: Entry) -> int:
    return prod(entry.shape) * getattr(torch, entry.dtype).itemsize


def buckets_of(entries: Sequence[Entry], bucket_bytes: int, owners: tuple[int, ...] | None = None) -> list[Bucket]:
    """Entries in buckets, in order. A new one begins where the next tensor does not fit or has another owner; a tensor
    larger than `bucket_bytes` has a bucket to itself. Trainer and engine come to the same buckets, and sync after
    sync to the same objects."""
    return _buckets_of(tuple(entry[:3] for entry in entries), bucket_bytes, owners)


@lru_cache(maxsize=8)
def _buckets_of(lines: tuple[tuple, ...], bucket_bytes: int, owners: tuple[int, ...] | None) -> list[Bucket]:
    buckets: list[Bucket] = []
    at = 0
    for group in parts([Entry(*line) for line in lines]):
        owner = owners[at] if owners else 0
        sizes = [-(-nbytes(entry) // ALIGNMENT) * ALIGNMENT for entry in group]
        if not buckets or buckets[-1].owner != owner or buckets[-1].nbytes + sum(sizes) > bucket_bytes:
            buckets.append(Bucket(owner, at))
        at += len(group)
        bucket = buckets[-1]
        bucket.groups.append(group)
        for entry, size in zip(group, sizes, strict=True):
            bucket.entries.append(entry)
            bucket.offsets.append(bucket.nbytes)
            bucket.nbytes += size
    return buckets


def sources(
    buckets: Sequence[Bucket], layout: Layout, tensors: Iterable[tuple[str, Tensor | None]]
) -> Iterator[tuple[Bucket, list[Tensor | None]]]:
    """Each bucket with the trainer's tensors that go into it, None where another rank has them; takes all of
    `tensors`. Raises ValueError where they are not those of `layout`.

    Little is done for each tensor: a fast link leaves the host less than a millisecond for a bucket."""
    incoming, number = iter(tensors), 0
    for bucket in buckets:
        offered = layout[number : number + len(bucket.groups)]
        found = list(islice(incoming, len(offered)))
        for (name, shape, dtype), (came, tensor) in zip(offered, found, strict=False):
            if came != name or (tensor is not None and (tensor.shape != shape or tensor.dtype != dtype)):
                kind = "" if tensor is None else f" {tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{came}{kind} came where {name} {tuple(shape)} {dtype} was offered")
        number += len(found)
        if len(found) < len(offered):
            name = offered[len(found)][0]
            raise ValueError(f"the weights ended after {number} of {len(layout)} tensors: {name} was to follow")
        yield bucket, [tensor for _, tensor in found]
    if (more := next(incoming, None)) is not None:
        raise ValueError(f"{more[0]} came behind the last of {len(layout)} tensors that were offered")


class Window:
    """Typed views of one buffer. They are made once: syncs repeat with the same shapes at the same places."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer  # uint8
        self._views: dict[Bucket, list[Tensor]] = {}
        self._places: dict[Bucket, list[tuple[Tensor, ...]]] = {}
        self._numbers_sent: dict[Bucket, Tensor] = {}
        self._readings: dict[Bucket, Reading] = {}

    def views(self, bucket: Bucket) -> list[Tensor]:
        """The bucket's tensors, one for each entry."""
        if bucket not in self._views:
            self._views[bucket] = [
                self.buffer[offset : offset + nbytes(entry)].view(getattr(torch, entry.dtype)).view(entry.shape)
                for entry, offset in zip(bucket.entries, bucket.offsets, strict=True)
            ]
        return self._views[bucket]

    @torch.no_grad()
    def pack(self, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
        """Copies the trainer's tensors into the buffer, in the form they travel in."""
        if bucket not in self._places:
            views = iter(self.views(bucket))
            self._places[bucket] = [tuple(next(views) for _ in group) for group in bucket.groups]
        put(tensors, self._places[bucket])

    def numbers(self, bucket: Bucket, out: Tensor | None = None) -> Int[Tensor, " entries"]:
        """The fingerprints of the bucket's tensors as they lie here, see `Reading`."""
        if bucket not in self._readings:
            self._readings[bucket] = Reading(self.views(bucket))
        return self._readings[bucket](out)

    def numbers_sent(self, bucket: Bucket) -> Int[Tensor, " entries"]:
        """The place behind the tensors where their fingerprints travel."""
        if bucket not in self._numbers_sent:
            place = self.buffer[bucket.nbytes : bucket.nbytes_with_numbers]
            self._numbers_sent[bucket] = place.view(torch.int64)
        return self._numbers_sent[bucket]
