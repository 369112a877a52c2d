"""Weights from the trainer's devices to engines on other devices: broadcasts, bucket by bucket.

The process groups are this transport's own, made on the first sync from torch's ProcessGroupNCCL (gloo on a CPU),
beside whatever groups trainer and engines have. Every rank that sends forms one with all engines: a tensor that only
one rank holds (an expert) goes from there to the engines, and no other rank of the trainer sees it. Two buckets are
in flight; their fingerprints travel behind them. Neither side ever holds a second copy of the model.

All that trainer and engines do on a GPU is ordered there: no side waits for it before the end, when all fingerprints
are compared at once. The kernel that takes those of a bucket runs while the next bucket travels, on NCCL's own stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import Checks, CorruptWeights, Layout, Manifest, Received, layout_of
from rollout.transport.buckets import BUCKET_BYTES, Bucket, Window, buckets_of, sources
from rollout.transport.nccl_group import Group
from rollout.transport.payload import Payload, travelling, travelling_owners

_IN_FLIGHT = 2


@dataclass(frozen=True)
class Published:
    """What an engine needs to take part in the broadcasts. `meetings` are where the group of each sending rank meets:
    a file, or host:port of that rank's store; `owners` the rank that sends each entry (None: rank 0 all)."""

    manifest: Manifest = field(repr=False)
    bucket_bytes: int
    engines: int
    meetings: dict[int, str]
    backend: str
    owners: tuple[int, ...] | None = field(default=None, repr=False)


def merged(handles: Sequence[Published]) -> Published:
    """One handle for the engines of those that the ranks of a trainer offered."""
    first = handles[0]
    if any(handle.manifest != first.manifest or handle.owners != first.owners for handle in handles[1:]):
        raise ValueError("the ranks of the trainer offered different weights: their layouts or versions differ")
    return replace(first, meetings={rank: place for handle in handles for rank, place in handle.meetings.items()})


class NcclTransport:
    """`publish`, or `offer` and `send` on each rank of the trainer; `receive` in each of `engines` processes with a
    device of its own.

    Trainer and engines share a host unless `host` names this rank's address that engines of others reach. A
    publication ends with its broadcast: every engine receives it once, and one that comes later needs the next.
    `timeout_s` is how long either side waits for the other before it gives up. `payload` as in IpcTransport."""

    def __init__(
        self,
        engines: int,
        bucket_bytes: int = BUCKET_BYTES,
        payload: Payload = None,
        host: str | None = None,
        timeout_s: float = 120.0,
    ):
        if engines < 1 or bucket_bytes < 1:
            raise ValueError(f"engines is {engines} and bucket_bytes {bucket_bytes}; both must be at least 1")
        self.engines, self.bucket_bytes, self.payload = engines, bucket_bytes, payload
        self.host, self.timeout_s = host, timeout_s
        self.checks = True  # False: nothing is compared, to measure what that costs
        self._groups: dict[int, Group] = {}  # by the rank that sends
        self._offer: _Offer | None = None
        self._sending: threading.Thread | None = None
        self._failure: Exception | None = None
        self._windows: list[Window] = []

    def __reduce__(self) -> tuple:
        """Travels as what it was made with: groups and buffers belong to this process."""
        return NcclTransport, (self.engines, self.bucket_bytes, self.payload, self.host, self.timeout_s)

    # --- the trainer's side ------------------------------------------------------------------------------------------

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        """`offer`, with a thread that does the sending: the weights must not change until `wait` returns. Raises what
        the last broadcast failed with."""
        tensors = list(tensors)
        device = tensors[0][1].device if tensors else torch.device("cpu")
        handle = self.offer(layout_of(tensors), version, device=device)
        self._sending = threading.Thread(target=self._send_alone, args=(tensors, device), name="weights to engines")
        self._sending.daemon = True
        self._sending.start()
        return handle

    def offer(
        self,
        layout: Layout,
        version: int,
        owners: Sequence[int] | None = None,
        rank: int = 0,
        device: torch.device | None = None,
    ) -> Published:
        """The handle of weights that `send` will bring from `device` (default: the current GPU, where there is one).
        With several ranks each calls this with its `rank` and the same layout; `owners` says which rank sends each
        tensor (default: rank 0 all of them), and engines are given the handles `merged`."""
        self.wait()
        if owners is not None and len(owners) != len(layout):
            raise ValueError(f"{len(owners)} owners for {len(layout)} tensors")
        if device is None:
            on_gpu = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        entries = travelling(layout, self.payload)
        of_entries = None if owners is None else travelling_owners(layout, owners, self.payload)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if rank in (owners or (0,)) and rank not in self._groups:
            self._groups[rank] = Group.host(self.engines, backend, self.host, self.timeout_s)
        meetings = {rank: self._groups[rank].meeting} if rank in self._groups else {}
        handle = Published(Manifest(version, entries), self.bucket_bytes, self.engines, meetings, backend, of_entries)
        self._offer = _Offer(handle, list(layout), rank, device)
        return handle

    def send(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """Brings what was offered, while the engines receive it; see `SentTransport`. None stands for a tensor that
        another rank sends."""
        offer, self._offer = self._offer, None
        if offer is None:
            raise RuntimeError("nothing was offered: call offer before each send")
        buckets = buckets_of(offer.handle.manifest.entries, self.bucket_bytes, offer.handle.owners)
        mine = [bucket for bucket in buckets if bucket.owner == offer.rank]
        works: list[Any] = []
        failure: RuntimeError | None = None
        try:
            for bucket, taken in sources(buckets, offer.layout, tensors):
                if bucket.owner != offer.rank or failure is not None:
                    continue  # the other ranks' collectives need this one to the end
                try:
                    self._send_bucket(bucket, taken, works, mine, offer)
                except RuntimeError as error:
                    failure = error
            if failure is None and mine:
                try:
                    for work in works[-_IN_FLIGHT:]:
                        work.wait()
                    self._groups[offer.rank].finish(offer.device)
                except RuntimeError as error:
                    failure = error
        except BaseException:
            self._drop(offer.rank)  # engines that wait see it
            raise
        if failure is not None:
            self._drop(offer.rank)
            version = offer.handle.manifest.version
            raise RuntimeError(
                f"version {version} of the weights did not reach every engine: the broadcast from rank {offer.rank} "
                f"failed at bucket {min(len(works), len(mine) - 1)} of {len(mine)}: {failure}"
            ) from failure

    def _send_bucket(
        self, bucket: Bucket, taken: list[Tensor | None], works: list[Any], mine: list[Bucket], offer: _Offer
    ) -> None:
        index, group = len(works), self._groups[offer.rank]
        group.meet()
        if index >= _IN_FLIGHT:
            works[index - _IN_FLIGHT].wait()  # on a GPU the stream waits, not this thread
        window = self._window(index % _IN_FLIGHT, mine, offer.device)
        window.pack(bucket, taken)
        if self.checks:
            window.numbers(bucket, out=window.numbers_sent(bucket))
        works.append(group.broadcast(window.buffer[: bucket.nbytes_with_numbers]))

    def _send_alone(self, tensors: list[tuple[str, Tensor]], device: torch.device) -> None:
        """`send` in a thread of its own, and on a stream of its own."""
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.default_stream(device))
                with torch.cuda.stream(stream):
                    self.send(tensors)
            else:
                self.send(tensors)
        except Exception as error:  # told by `wait`, on the trainer's own thread
            self._failure = error

    def wait(self) -> None:
        """Returns once the last publication has been broadcast: the weights may change. Raises what went wrong."""
        if self._sending is not None:
            self._sending.join()
            self._sending = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise RuntimeError(f"the broadcast of the weights failed: {failure}") from failure

    def close(self) -> None:
        """Leaves the groups: the next sync makes new ones, for engines that were started again too."""
        for rank in list(self._groups):
            self._drop(rank)
        self._windows = []

    def _drop(self, rank: int) -> None:
        group = self._groups.pop(rank, None)
        if group is not None:
            group.abort()

    # --- the engine's side -------------------------------------------------------------------------------------------

    def manifest(self, handle: Published) -> Manifest:
        return handle.manifest

    def receive(self, handle: Published) -> Received:
        manifest = Manifest(handle.manifest.version, handle.manifest.entries)
        return Received(manifest, self._tensors(handle, manifest))

    def _tensors(self, handle: Published, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        device = torch.device("cuda", torch.cuda.current_device()) if handle.backend == "nccl" else torch.device("cpu")
        buckets = buckets_of(handle.manifest.entries, handle.bucket_bytes, handle.owners)
        self._join(handle, {bucket.owner for bucket in buckets})
        works: list[Any] = []
        checks = Checks()

        def begin() -> None:
            bucket = buckets[len(works)]
            window = self._window(len(works) % _IN_FLIGHT, buckets, device)
            works.append(self._groups[bucket.owner].broadcast(window.buffer[: bucket.nbytes_with_numbers]))

        index, broken = 0, False
        try:
            for _ in range(min(_IN_FLIGHT - 1, len(buckets))):
                begin()
            for index, bucket in enumerate(buckets):
                # The next one travels meanwhile, into the other buffer, behind the copies that still read there.
                if len(works) < len(buckets):
                    begin()
                works[index].wait()
                window = self._windows[index % _IN_FLIGHT]
                if self.checks:
                    sent = window.numbers_sent(bucket)
                    checks.add(bucket.entries, window.numbers(bucket), sent.clone() if sent.is_cuda else sent)
                for entry, tensor in zip(bucket.entries, window.views(bucket), strict=True):
                    yield entry.name, tensor
            if buckets:
                self._groups[buckets[-1].owner].finish(device)
            if self.checks:
                manifest.entries = checks.finish()
        except RuntimeError as error:
            broken = True
            self.close()
            raise CorruptWeights(f"weights did not arrive: the broadcast of bucket {index} failed: {error}") from error
        finally:
            try:
                while not broken and len(works) < len(buckets):  # whoever gives up early still takes part to the end
                    begin()
                    works[-1].wait()
            except RuntimeError:  # what it gave up for is told
                self.close()

    def _join(self, handle: Published, owners: set[int]) -> None:
        """This engine's place in the group of every rank that sends."""
        for owner in sorted(owners):
            group = self._groups.get(owner)
            if group is not None and group.meeting == handle.meetings.get(owner):
                continue
            if owner not in handle.meetings:
                raise CorruptWeights(
                    f"weights cannot arrive: rank {owner} of the trainer sends some of them, its handle is not here: "
                    "engines take the handles of all ranks, merged"
                )
            joined = Group.join(handle.meetings[owner], handle.engines, handle.backend, self.timeout_s)
            if joined is None:
                raise CorruptWeights(
                    f"weights cannot arrive: {handle.engines} engines receive from this trainer and this is one more "
                    "(one that was started again has to wait for a new group)"
                )
            self._groups[owner] = joined

    def _window(self, slot: int, buckets: Sequence[Bucket], device: torch.device) -> Window:
        """A buffer that holds each of these buckets."""
        size = max(bucket.nbytes_with_numbers for bucket in buckets)
        while len(self._windows) <= slot:
            self._windows.append(Window(torch.empty(0, dtype=torch.uint8, device=device)))
        if len(self._windows[slot].buffer) < size or self._windows[slot].buffer.device != device:
            self._windows[slot] = Window(torch.empty(size, dtype=torch.uint8, device=device))
        return self._windows[slot]

    def plain_broadcast(self, nbytes: int, device: torch.device) -> None:
        """Broadcasts that many bytes from rank 0 in one piece, without weights: what a transfer costs at the least.
        Trainer and engines call it together after a first publication."""
        self._groups[0].broadcast(torch.empty(nbytes, dtype=torch.uint8, device=device)).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Offer:
    handle: Published
    layout: Layout
    rank: int
    device: torch.device
