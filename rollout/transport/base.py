"""How weights travel from the trainer into an engine: a manifest goes first, every tensor is checked against it.

A transport is one file beside this one. `publish` runs where the trainer is, `receive` where the engine is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplying by it modulo 2^64 loses nothing
_CHUNK = 1 << 20  # words summed at a time: bounds the memory of a fingerprint


class CorruptWeights(ValueError):
    """A tensor is not what the manifest promised. The message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor: `fingerprint` is `fingerprint(tensor)` where it was published."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int


@dataclass(frozen=True)
class Manifest:
    """What a receiver will get, in order."""

    version: int
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "entries": [asdict(e) for e in self.entries]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        entries = (Entry(e["name"], tuple(e["shape"]), e["dtype"], e["fingerprint"]) for e in data["entries"])
        return Manifest(data["version"], tuple(entries))


class Transport(Protocol):
    """`handle` is small, picklable and all that has to reach the engine."""

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Any: ...

    def manifest(self, handle: Any) -> Manifest: ...

    def receive(self, handle: Any) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the manifest's order, each verified. They may share memory with the transport: a receiver
        copies what it keeps and writes to none. Raises CorruptWeights."""
        ...


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor (a view where it is contiguous)."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit sum over the tensor's bytes, the same on every device: words of 8 bytes, each scrambled together with
    its place by a bijection, summed modulo 2^64. One changed word always changes it; it guards against accidents, not
    against an adversary."""
    data = as_bytes(tensor)
    rest = -len(data) % 8
    if rest:
        data = torch.cat([data, data.new_zeros(rest)])
    words = data.view(torch.int64) if data.storage_offset() % 8 == 0 else data.clone().view(torch.int64)
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        place = torch.arange(start + 1, start + 1 + len(part), dtype=torch.int64, device=part.device)
        part = part ^ place.mul_(_MULTIPLIER)
        for _ in range(2):  # high bits reach the low ones, low ones the high
            part = part.bitwise_xor_((part >> 32) & 0xFFFFFFFF).mul_(_MULTIPLIER)
        total += int(part.bitwise_xor_((part >> 32) & 0xFFFFFFFF).sum())
    return (total + tensor.numel()) % (1 << 64)


def describe(name: str, tensor: Tensor) -> Entry:
    """The manifest's line for a tensor."""
    return Entry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), fingerprint(tensor))


def verify(entry: Entry, tensor: Tensor) -> None:
    """Raises CorruptWeights unless the tensor is the one the entry describes."""
    found = describe(entry.name, tensor)
    if found != entry:
        what = next(key for key, value in asdict(entry).items() if asdict(found)[key] != value)
        raise CorruptWeights(
            f"weights arrived damaged: {entry.name} has {what} {getattr(found, what)}, "
            f"published was {getattr(entry, what)}. Publish the weights again."
        )


def changed(published: Manifest, held: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of held tensors that differ from the published ones, and of published ones that are not held."""
    known = {entry.name: entry for entry in published.entries}
    wrong = [name for name, tensor in held if name in known and describe(name, tensor) != known.pop(name, None)]
    return wrong + list(known)
