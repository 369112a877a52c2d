"""How weights travel from a trainer into engines: one protocol, whatever carries them.

Each rank of the trainer has a `Sender`. `prepare` says at once what will come, as a `WeightUpdate`: names, shapes and
dtypes. It is handed to every process that holds weights of an engine, and while their `Receiver`s wait for the tensors,
`send` brings them, a bucket at a time. They are read once and never held twice. Each bucket travels with the checksums
of its tensors, and every receiver compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rollout.transport.checksum import checksums

Layout = Sequence[tuple[str, Sequence[int], torch.dtype]]  # names, shapes and dtypes, in the order of the tensors
Tensors = list[tuple[str, Tensor]]

_MODULUS = 1 << 64  # of checksums


class CorruptWeights(ValueError):
    """Weights did not arrive, or are not those that were sent. The message says which, and names the tensor."""


class TensorSpec(NamedTuple):
    """One tensor of an update. `dtype` is torch's name without "torch."; `checksum` None: not known yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class WeightUpdate:
    """What a receiver needs to take one version of the weights: small and picklable. `specs` are in the order in which
    the tensors come, without their checksums; `bucket_bytes` is how many bytes travel at a time."""

    version: int
    specs: tuple[TensorSpec, ...] = field(repr=False)
    bucket_bytes: int


class Sender(Protocol):
    """The end of one trainer rank."""

    def prepare(self, layout: Layout, version: int, owners: Sequence[int] | None = None) -> WeightUpdate:
        """What `send` will bring. Every rank is given the same layout; `owners` are the ranks that hold each tensor in
        what they send (default: rank 0 all of them)."""
        ...

    def send(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """Brings the tensors of the layout to every receiver. It takes all of `tensors` whatever happens to a receiver,
        because a gather needs its ranks to the end, and then raises RuntimeError where one was not reached."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """The end of one process that holds weights of an engine. It keeps mapped buffers or groups from sync to sync."""

    def receive(self, update: WeightUpdate) -> Received: ...

    def close(self) -> None: ...


class Checks:
    """Arriving tensors against the checksums they were sent with. On a CPU a bucket is compared when it is added; on a
    GPU the numbers stay there and nothing waits: `finish` reads all of them at once."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []  # with their checksums, once compared
        self._waiting: list[tuple[Sequence[TensorSpec], Tensor, Tensor | Sequence[int]]] = []

    def add(self, specs: Sequence[TensorSpec], found: Tensor, sent: Tensor | Sequence[int]) -> None:
        """`found` and `sent`: a checksum for each, modulo 2^64. Raises CorruptWeights at once where they are on the
        CPU, see `finish`."""
        self._waiting.append((specs, found, sent))
        if not found.is_cuda:
            self.finish()

    def finish(self) -> None:
        """Raises CorruptWeights, naming the first tensor that is not the one that was sent."""
        on_gpu = [n for _, found, sent in self._waiting for n in (found, sent) if _on_gpu(n)]
        numbers = iter(torch.cat(on_gpu).tolist() if on_gpu else ())
        for specs, found, sent in self._waiting:
            ours, theirs = (
                [next(numbers) for _ in specs] if _on_gpu(n) else n.tolist() if isinstance(n, Tensor) else list(n)
                for n in (found, sent)
            )
            if ours != theirs:
                for spec, our, their in zip(specs, ours, theirs, strict=True):
                    if (our - their) % _MODULUS:
                        raise CorruptWeights(
                            f"weights arrived damaged: {spec.name} has checksum {our % _MODULUS}, sent was "
                            f"{their % _MODULUS}. Send the weights again."
                        )
            self.specs += [spec._replace(checksum=n % _MODULUS) for spec, n in zip(specs, theirs, strict=True)]
        self._waiting = []


def _on_gpu(numbers: Tensor | Sequence[int]) -> bool:
    return isinstance(numbers, Tensor) and numbers.is_cuda


class Received:
    """The tensors of one update as they arrive, in the order of its specs; iterating gives (name, tensor), each
    compared with its checksum (on a GPU when the last has arrived), and raises CorruptWeights. They share memory with
    the transport and hold only until the next bucket is asked for: a receiver copies what it keeps, on its current
    stream, and writes to none."""

    def __init__(self, specs: Sequence[TensorSpec], buckets: Iterator[Tensors], checks: Checks):
        self.specs, self._buckets, self._checks = tuple(specs), buckets, checks
        self._first: list[Tensors] = []

    def start(self) -> None:
        """Takes the first bucket: from now on this receiver takes part, whatever its owner does before it iterates."""
        self._first += [bucket for bucket in [next(self._buckets, None)] if bucket is not None]

    def buckets(self) -> Iterator[Tensors]:
        """The tensors that arrive together."""
        if self._first:
            yield self._first.pop()
        yield from self._buckets

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self.buckets():
            yield from bucket

    @property
    def sent(self) -> Sequence[TensorSpec]:
        """The specs with the checksums that were sent, once all tensors have arrived."""
        return self._checks.specs

    def close(self) -> None:
        """Lets go of the sender where not everything was taken."""
        self._buckets.close()


def at_hand(weights: Iterable[tuple[str, Tensor]]) -> Received:
    """Tensors of this process as if they had arrived."""
    named, checks = list(weights), Checks()

    def buckets() -> Iterator[Tensors]:
        for name, tensor in named:
            checks.specs.append(describe(name, tensor))
            yield [(name, tensor)]

    return Received([_spec(name, tensor) for name, tensor in named], buckets(), checks)


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def describe(name: str, tensor: Tensor) -> TensorSpec:
    """The spec of a tensor with its checksum."""
    return _spec(name, tensor)._replace(checksum=checksums([tensor])[0])


def layout_of(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
