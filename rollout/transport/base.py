"""How weights travel from the trainer into an engine: a manifest goes first, every tensor is checked against it.

A transport is one file beside this one. `publish` runs where the trainer is, `receive` where the engine is. Where the
weights are gathered from several ranks while they travel, two calls take the place of `publish`: `offer`, which says
what will come, and `send`, which brings it, with each bucket's fingerprints beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rollout.transport.fingerprint import as_bytes, fingerprint, fingerprints

__all__ = ["Checks", "CorruptWeights", "Entry", "Layout", "Manifest", "Received", "Transport", "as_bytes", "changed"]
__all__ += ["describe", "describe_all", "fingerprint", "layout_of", "verify", "verify_all"]

_NUMBERS = 1 << 64  # of which a fingerprint is one
Layout = Sequence[tuple[str, Sequence[int], torch.dtype]]  # names, shapes and dtypes, in the order of the tensors


class CorruptWeights(ValueError):
    """A tensor is not what the manifest promised. The message names it."""


class Entry(NamedTuple):
    """One tensor: `fingerprint` is `fingerprint(tensor)` where it was published, None until it is known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fingerprint: int | None = None


@dataclass
class Manifest:
    """What a receiver will get, in order. Fingerprints that travel with the tensors are filled in behind the last."""

    version: int
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version, "entries": [entry._asdict() for entry in self.entries]}

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


class SentTransport(Transport, Protocol):
    """Of weights that are gathered while they travel, once for all who receive them."""

    def offer(self, layout: Layout, version: int) -> Any:
        """The handle, at once: what `send` will bring."""
        ...

    def send(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """Brings what was offered to every engine that it was offered to, a bucket at a time. Takes every one of
        `tensors` whatever happens to an engine, because a gather needs all its ranks to the end, and raises
        RuntimeError after that."""
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
        _same(ours, theirs)


def _same(ours: Entry, theirs: Entry) -> None:
    if ours != theirs:
        what = next(key for key, our, their in zip(Entry._fields, ours, theirs, strict=True) if our != their)
        raise CorruptWeights(
            f"weights arrived damaged: {theirs.name} has {what} {getattr(ours, what)}, "
            f"published was {getattr(theirs, what)}. Publish the weights again."
        )


def layout_of(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]


class Checks:
    """Arriving tensors against the fingerprints they were published with. On a CPU a bucket is compared when it is
    added; on a GPU its numbers stay there and nothing waits: `finish` reads all of them at once."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[Entry], Tensor, Tensor | Sequence[int]]] = []
        self.entries: list[Entry] = []  # with their fingerprints, once compared

    def add(self, entries: Sequence[Entry], found: Tensor, published: Tensor | Sequence[int]) -> None:
        """`found` and `published`: a number for each, modulo 2^64. Raises CorruptWeights (see `finish`) at once where
        the numbers are on the CPU."""
        self._waiting.append((entries, found, published))
        if not found.is_cuda:
            self.finish()

    def finish(self) -> tuple[Entry, ...]:
        """The entries of everything that was added. Raises CorruptWeights, naming the first damaged tensor."""
        on_gpu = [n for _, found, published in self._waiting for n in (found, published) if _on_gpu(n)]
        numbers = iter(torch.cat(on_gpu).tolist() if on_gpu else ())
        for entries, found, published in self._waiting:
            ours, theirs = (
                [next(numbers) for _ in entries] if _on_gpu(n) else n.tolist() if isinstance(n, Tensor) else list(n)
                for n in (found, published)
            )
            compared = [Entry(e.name, e.shape, e.dtype, n % _NUMBERS) for e, n in zip(entries, theirs, strict=True)]
            if [n % _NUMBERS for n in ours] != [entry.fingerprint for entry in compared]:
                for entry, our in zip(compared, ours, strict=True):
                    _same(entry._replace(fingerprint=our % _NUMBERS), entry)
            self.entries += compared
        self._waiting = []
        return tuple(self.entries)


def _on_gpu(numbers: Tensor | Sequence[int]) -> bool:
    return isinstance(numbers, Tensor) and numbers.is_cuda


def changed(published: Manifest, held: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of held tensors that differ from the published ones, and of published ones that are not held."""
    known = {entry.name: entry for entry in published.entries}
    wrong = [name for name, tensor in held if name in known and describe(name, tensor) != known.pop(name, None)]
    return wrong + list(known)
