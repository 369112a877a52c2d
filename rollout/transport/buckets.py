"""Tensors laid side by side in buffers of bounded size: what the transports send at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from rollout.transport.base import Layout, TensorSpec
from rollout.transport.checksum import Checksums
from rollout.transport.payload import grouped, put

ALIGNMENT = 64  # bytes; every tensor starts on one
BUCKET_BYTES = 256 << 20


@dataclass(eq=False)
class Bucket:
    """The tensors of one bucket and the byte at which each begins. `groups` are the specs of each tensor of the
    trainer: one, or an FP8 weight and its scales. All come from the rank `owner`."""

    owner: int = 0
    specs: list[TensorSpec] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    groups: list[tuple[TensorSpec, ...]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def nbytes_with_checksums(self) -> int:
        """With the checksums behind the tensors."""
        return self.nbytes + 8 * len(self.specs)


def buckets_of(
    specs: Sequence[TensorSpec], bucket_bytes: int, owners: tuple[int, ...] | None = None
) -> tuple[Bucket, ...]:
    """Tensors in buckets, in order. A new one begins where the next tensor does not fit or has another owner; a tensor
    larger than `bucket_bytes` has a bucket to itself. Trainer and engine come to the same buckets, and sync after
    sync to the same objects."""
    return _buckets_of(tuple(specs), bucket_bytes, owners)


@lru_cache(maxsize=8)
def _buckets_of(specs: tuple[TensorSpec, ...], bucket_bytes: int, owners: tuple[int, ...] | None) -> tuple[Bucket, ...]:
    buckets: list[Bucket] = []
    at = 0
    for group in grouped(specs):
        owner = owners[at] if owners else 0
        at += len(group)
        sizes = [-(-spec.nbytes // ALIGNMENT) * ALIGNMENT for spec in group]
        if not buckets or buckets[-1].owner != owner or buckets[-1].nbytes + sum(sizes) > bucket_bytes:
            buckets.append(Bucket(owner))
        bucket = buckets[-1]
        bucket.groups.append(group)
        for spec, size in zip(group, sizes, strict=True):
            bucket.specs.append(spec)
            bucket.offsets.append(bucket.nbytes)
            bucket.nbytes += size
    return tuple(buckets)


def largest(buckets: Iterable[Bucket]) -> int:
    """Bytes of a buffer that holds each of these buckets."""
    return max((bucket.nbytes_with_checksums for bucket in buckets), default=0)


def filled(
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


class BucketViews:
    """Typed views of one buffer. They are made once: syncs repeat with the same shapes at the same places."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer  # uint8
        self._tensors: dict[Bucket, list[Tensor]] = {}
        self._groups: dict[Bucket, list[tuple[Tensor, ...]]] = {}
        self._checksums: dict[Bucket, Checksums] = {}

    def tensors(self, bucket: Bucket) -> list[Tensor]:
        """The bucket's tensors, one for each of its specs."""
        if bucket not in self._tensors:
            self._tensors[bucket] = [
                self.buffer[offset : offset + spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)
                for spec, offset in zip(bucket.specs, bucket.offsets, strict=True)
            ]
        return self._tensors[bucket]

    def named(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        return [(spec.name, view) for spec, view in zip(bucket.specs, self.tensors(bucket), strict=True)]

    @torch.no_grad()
    def pack(self, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
        """Copies the trainer's tensors into the buffer, in the form they travel in."""
        if bucket not in self._groups:
            views = iter(self.tensors(bucket))
            self._groups[bucket] = [tuple(next(views) for _ in group) for group in bucket.groups]
        put(tensors, self._groups[bucket])

    def checksums(self, bucket: Bucket, out: Tensor | None = None) -> Int[Tensor, " tensors"]:
        """Of the bucket's tensors as they lie here, see `Checksums`."""
        if bucket not in self._checksums:
            self._checksums[bucket] = Checksums(self.tensors(bucket))
        return self._checksums[bucket](out)

    def sent(self, bucket: Bucket) -> Int[Tensor, " tensors"]:
        """The place behind the tensors where their checksums travel."""
        return self.buffer[bucket.nbytes : bucket.nbytes_with_checksums].view(torch.int64)
