"""Weights through Ray's object store: on one node the engine reads the very memory the trainer wrote."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import ray
import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, Entry, Manifest, Received, as_bytes, describe, verify


@dataclass(frozen=True)
class Published:
    """The manifest and, in order, the buckets that hold the tensors' bytes. Dropping the last copy frees them."""

    manifest: Manifest
    buckets: tuple[ray.ObjectRef, ...] = field(repr=False)


def _tensor(data: np.ndarray, entry: Entry) -> Tensor:
    with warnings.catch_warnings():  # the store's memory is read-only; receivers copy and never write
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(data)
    dtype = getattr(torch, entry.dtype)
    if not len(data):
        return torch.empty(entry.shape, dtype=dtype)
    return flat.view(dtype).view(entry.shape)


class ObjectStoreTransport:
    """`publish` puts the tensors' bytes into objects of at most `bucket_bytes`; a tensor larger than what is left of
    a bucket goes on in the next one. `receive` holds one bucket at a time, and hands out views of it where a tensor
    lies in one piece."""

    _ALIGNMENT = 64  # bytes; every tensor starts on one

    def __init__(self, bucket_bytes: int = 256 << 20):
        if bucket_bytes < self._ALIGNMENT or bucket_bytes % self._ALIGNMENT:
            raise ValueError(f"bucket_bytes is {bucket_bytes}, expected a multiple of {self._ALIGNMENT}")
        self.bucket_bytes = bucket_bytes

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        entries: list[Entry] = []
        buckets: list[ray.ObjectRef] = []
        bucket, used = np.empty(self.bucket_bytes, np.uint8), 0
        for name, tensor in tensors:
            entries.append(describe(name, tensor))
            data = as_bytes(tensor).cpu().numpy()
            start = 0
            while start < len(data):
                size = min(len(data) - start, self.bucket_bytes - used)
                bucket[used : used + size] = data[start : start + size]
                start += size
                used += -(-size // self._ALIGNMENT) * self._ALIGNMENT
                if used >= self.bucket_bytes:
                    buckets.append(ray.put(bucket))
                    used = 0
        if used:
            buckets.append(ray.put(bucket[:used]))
        return Published(Manifest(version, tuple(entries)), tuple(buckets))

    def manifest(self, handle: Published) -> Manifest:
        return handle.manifest

    def receive(self, handle: Published) -> Received:
        return Received(self.manifest(handle), self._tensors(handle))

    def _tensors(self, handle: Published) -> Iterator[tuple[str, Tensor]]:
        refs = iter(handle.buckets)
        bucket, used = np.empty(0, np.uint8), 0
        for entry in handle.manifest.entries:
            remaining = int(np.prod(entry.shape, dtype=np.int64)) * getattr(torch, entry.dtype).itemsize
            pieces: list[np.ndarray] = []
            while remaining:
                if used >= len(bucket):
                    ref = next(refs, None)
                    if ref is None:
                        raise CorruptWeights(f"weights arrived damaged: the buckets end before {entry.name}")
                    bucket, used = ray.get(ref), 0
                pieces.append(bucket[used : used + remaining])
                remaining -= len(pieces[-1])
                used += -(-len(pieces[-1]) // self._ALIGNMENT) * self._ALIGNMENT
            tensor = _tensor(pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [bucket[:0]]), entry)
            verify(entry, tensor)
            yield entry.name, tensor
