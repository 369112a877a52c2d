"""Weights from the trainer's devices to engines on other devices: broadcasts, bucket by bucket, on this host or others.

The process groups are this transport's own, made on the first sync from torch's ProcessGroupNCCL (gloo on CPUs),
beside whatever groups trainer and engines have. Every rank that sends forms one with all receivers, which meet it at
its store (rollout.transport.broadcast_group): a tensor that only one rank holds (an expert) goes from there to the
engines, and no other rank of the trainer sees it. Two buckets are in flight; their checksums travel behind them.

All that trainer and engines do on a GPU is ordered there: no side waits for it before the end, when all checksums
are compared at once. The kernel that takes those of a bucket runs while the next bucket travels, on NCCL's own stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import Checks, CorruptWeights, Layout, Received, Tensors, WeightUpdate
from rollout.transport.broadcast_group import BroadcastGroup
from rollout.transport.buckets import BUCKET_BYTES, Bucket, BucketViews, buckets_of, filled, largest
from rollout.transport.payload import Payload, travelling, travelling_owners

_IN_FLIGHT = 2


@dataclass(frozen=True)
class NcclUpdate(WeightUpdate):
    """`stores` are the host:port at which each sending rank is met; `owners` the rank that sends each tensor (None:
    rank 0 all)."""

    receivers: int
    stores: dict[int, str]
    backend: str
    owners: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return buckets_of(self.specs, self.bucket_bytes, self.owners)


def merged(updates: Sequence[NcclUpdate]) -> NcclUpdate:
    """One update for the receivers of those that the ranks of a trainer prepared."""
    first = updates[0]
    if any(replace(update, stores=first.stores) != first for update in updates[1:]):
        raise ValueError("the ranks of the trainer prepared different weights: their layouts or versions differ")
    return replace(first, stores={rank: store for update in updates for rank, store in update.stores.items()})


class NcclSender:
    """Sends from `device` to `receivers` processes with devices of their own, as the trainer's rank `rank`. `host` is
    the address of this node that they reach; `timeout_s` how long either side waits for the other. `payload` as in
    IpcSender."""

    def __init__(
        self,
        device: torch.device,
        receivers: int = 1,
        payload: Payload = None,
        rank: int = 0,
        host: str = "127.0.0.1",
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = 120.0,
    ):
        self.device, self.receivers, self.payload, self.rank, self.host = device, receivers, payload, rank, host
        self.bucket_bytes, self.timeout_s = bucket_bytes, timeout_s
        self._group: BroadcastGroup | None = None
        self._layout: Layout = []
        self._update: NcclUpdate | None = None
        self._ring: list[BucketViews] = []

    def prepare(self, layout: Layout, version: int, owners: Sequence[int] | None = None) -> NcclUpdate:
        """See `Sender`. Receivers are given the updates of all ranks, `merged`."""
        if owners is not None and len(owners) != len(layout):
            raise ValueError(f"{len(owners)} owners for {len(layout)} tensors")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.rank in (owners or (0,)) and self._group is None:
            self._group = BroadcastGroup.host(self.receivers, backend, self.host, self.timeout_s)
        self._layout = list(layout)
        self._update = NcclUpdate(
            version,
            travelling(layout, self.payload),
            self.bucket_bytes,
            self.receivers,
            {} if self._group is None else {self.rank: self._group.store_address},
            backend,
            None if owners is None else travelling_owners(layout, owners, self.payload),
        )
        return self._update

    def send(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """See `Sender`. None stands for a tensor that another rank sends."""
        update, self._update = self._update, None
        if update is None:
            raise RuntimeError("no update was prepared: call prepare before each send")
        mine = [bucket for bucket in update.buckets if bucket.owner == self.rank]
        works: list[Any] = []
        failure: RuntimeError | None = None
        try:
            for bucket, taken in filled(update.buckets, self._layout, tensors):
                if bucket.owner != self.rank or failure is not None:
                    continue  # the other ranks' collectives need this one to the end
                try:
                    self._send_bucket(bucket, taken, works, mine)
                except RuntimeError as error:
                    failure = error
            if failure is None and mine:
                try:
                    for work in works[-_IN_FLIGHT:]:
                        work.wait()
                    self._group.finish(self.device)
                except RuntimeError as error:
                    failure = error
        except BaseException:
            self.close()  # receivers that wait see it
            raise
        if failure is not None:
            self.close()
            raise RuntimeError(
                f"version {update.version} of the weights did not reach every engine: the broadcast from rank "
                f"{self.rank} failed at bucket {min(len(works), len(mine) - 1)} of {len(mine)}: {failure}"
            ) from failure

    def close(self) -> None:
        """Leaves the group: the next sync makes a new one, for receivers that were started again too."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _send_bucket(
        self, bucket: Bucket, taken: list[Tensor | None], works: list[Any], mine: Sequence[Bucket]
    ) -> None:
        index = len(works)
        self._group.meet()
        if index >= _IN_FLIGHT:
            works[index - _IN_FLIGHT].wait()  # on a GPU the stream waits, not this thread
        if index == 0:
            _fit(self._ring, mine, self.device)
        views = self._ring[index % _IN_FLIGHT]
        views.pack(bucket, taken)
        views.checksums(bucket, out=views.sent(bucket))
        works.append(self._group.broadcast(views.buffer[: bucket.nbytes_with_checksums]))


class NcclReceiver:
    """Receives in a process with a device of its own: the current GPU, or a CPU. `timeout_s` is the sender's."""

    def __init__(self, timeout_s: float = 120.0):
        self.timeout_s = timeout_s
        self._groups: dict[int, BroadcastGroup] = {}  # by the rank that sends
        self._ring: list[BucketViews] = []

    def receive(self, update: NcclUpdate) -> Received:
        checks = Checks()
        return Received(update.specs, self._buckets(update, checks), checks)

    def close(self) -> None:
        """Leaves the groups."""
        while self._groups:
            self._groups.popitem()[1].abort()

    def _buckets(self, update: NcclUpdate, checks: Checks) -> Iterator[Tensors]:
        device = torch.device("cuda", torch.cuda.current_device()) if update.backend == "nccl" else torch.device("cpu")
        buckets, ring, works = update.buckets, self._ring, []
        self._join(update)
        _fit(ring, buckets, device)

        def begin() -> None:
            bucket = buckets[len(works)]
            buffer = ring[len(works) % _IN_FLIGHT].buffer
            works.append(self._groups[bucket.owner].broadcast(buffer[: bucket.nbytes_with_checksums]))

        index, broken = 0, False
        try:
            for _ in range(min(_IN_FLIGHT - 1, len(buckets))):
                begin()
            for index, bucket in enumerate(buckets):
                # The next one travels meanwhile, into the other buffer, behind the copies that still read there.
                if len(works) < len(buckets):
                    begin()
                works[index].wait()
                views = ring[index % _IN_FLIGHT]
                sent = views.sent(bucket)
                checks.add(bucket.specs, views.checksums(bucket), sent.clone() if sent.is_cuda else sent)
                yield views.named(bucket)
            if buckets:
                self._groups[buckets[-1].owner].finish(device)
            checks.finish()
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

    def _join(self, update: NcclUpdate) -> None:
        """This process's place in the group of every rank that sends."""
        for owner in sorted({bucket.owner for bucket in update.buckets}):
            group, store = self._groups.get(owner), update.stores.get(owner)
            if store is None:
                raise CorruptWeights(
                    f"weights cannot arrive: rank {owner} of the trainer sends some of them, its store is not here: "
                    "engines take the updates of all ranks, merged"
                )
            if group is not None and group.store_address == store:
                continue
            try:
                joined = BroadcastGroup.join(store, update.receivers, update.backend, self.timeout_s)
            except (OSError, RuntimeError) as error:
                raise CorruptWeights(f"weights cannot arrive: nobody is met at the store {store} ({error})") from error
            if joined is None:
                raise CorruptWeights(
                    f"weights cannot arrive: {update.receivers} processes receive from this trainer and this is one "
                    "more (one that was started again has to wait for a new group)"
                )
            self._groups[owner] = joined


def _fit(ring: list[BucketViews], buckets: Sequence[Bucket], device: torch.device) -> None:
    """Makes the buffers anew, unless they are on the device and each of the buckets fits in."""
    size = largest(buckets)
    if not ring or len(ring[0].buffer) < size or ring[0].buffer.device != device:
        ring[:] = [BucketViews(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(_IN_FLIGHT)]
