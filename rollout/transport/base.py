"""How weights travel from the trainer into an engine: a manifest goes first, every tensor is checked against it.

A transport is one file beside this one. `publish` runs where the trainer is, `receive` where the engine is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from rollout.transport.fingerprint import as_bytes, fingerprint, fingerprints

__all__ = ["CorruptWeights", "Entry", "Manifest", "Received", "Transport", "as_bytes", "changed", "describe"]
__all__ += ["describe_all", "fingerprint", "verify", "verify_all"]


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

    def receive(self, handle: Any) -> Received:
        """The tensors in the manifest's order, each verified. They may share memory with the transport and hold only
        until the next one is asked for: a receiver copies what it keeps, on its current stream, and writes to none.
        Raises CorruptWeights."""
        ...


class Received(Iterator[tuple[str, Tensor]]):
    """(name, tensor) of one publication as they arrive, and the manifest that they were checked against."""

    def __init__(self, manifest: Manifest, tensors: Iterator[tuple[str, Tensor]]):
        self.manifest, self._tensors = manifest, tensors

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._tensors)

    def close(self) -> None:
        """Lets go of the publisher where not everything was taken."""
        close = getattr(self._tensors, "close", None)
        if close is not None:
            close()


def describe(name: str, tensor: Tensor) -> Entry:
    """The manifest's line for a tensor."""
    return describe_all([(name, tensor)])[0]


def describe_all(named: Sequence[tuple[str, Tensor]]) -> list[Entry]:
    """The manifest's lines for tensors, their fingerprints taken together."""
    numbers = fingerprints([tensor for _, tensor in named])
    return [
        Entry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), number)
        for (name, tensor), number in zip(named, numbers, strict=True)
    ]


def verify(entry: Entry, tensor: Tensor) -> None:
    """Raises CorruptWeights unless the tensor is the one the entry describes."""
    verify_all([entry], [tensor])


def verify_all(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
    """Raises CorruptWeights, naming the first tensor that is not what its entry describes."""
    found = describe_all([(entry.name, tensor) for entry, tensor in zip(entries, tensors, strict=True)])
    for ours, theirs in zip(found, entries, strict=True):
        if ours != theirs:
            what = next(key for key, value in asdict(theirs).items() if asdict(ours)[key] != value)
            raise CorruptWeights(
                f"weights arrived damaged: {theirs.name} has {what} {getattr(ours, what)}, "
                f"published was {getattr(theirs, what)}. Publish the weights again."
            )


def changed(published: Manifest, held: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of held tensors that differ from the published ones, and of published ones that are not held."""
    known = {entry.name: entry for entry in published.entries}
    wrong = [name for name, tensor in held if name in known and describe(name, tensor) != known.pop(name, None)]
    return wrong + list(known)
