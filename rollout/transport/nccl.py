"""Weights from the trainer's device to engines on other devices: one broadcast, bucket by bucket.

The process group is this transport's own, made on the first publication from torch's ProcessGroupNCCL (gloo on a CPU),
beside whatever groups trainer and engines have. The trainer broadcasts in a thread, two buckets in flight; every
engine of the group has to receive each publication. Neither side ever holds a second copy of the model."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.transport.base import CorruptWeights, Entry, Manifest, Received, describe_all, verify_all
from rollout.transport.buckets import BUCKET_BYTES, Window, buckets_of, buckets_of_entries

_IN_FLIGHT = 2


@dataclass(frozen=True)
class Published:
    """What an engine needs to take part in one broadcast. `meeting` is a file, or host:port of the trainer's store."""

    manifest: Manifest = field(repr=False)
    bucket_bytes: int
    engines: int
    meeting: str
    backend: str


class NcclTransport:
    """`publish` on the trainer, `receive` in each of `engines` processes with a device of its own.

    Trainer and engines share a host unless `host` names the trainer's address that engines of others reach. A
    publication ends with its broadcast: every engine receives it once, and one that comes later needs the next.
    `timeout_s` bounds a broadcast; NCCL ends a process whose peer is gone by then. `payload` as in IpcTransport."""

    def __init__(
        self,
        engines: int,
        bucket_bytes: int = BUCKET_BYTES,
        payload: torch.dtype | None = None,
        host: str | None = None,
        timeout_s: float = 120.0,
    ):
        if engines < 1 or bucket_bytes < 1:
            raise ValueError(f"engines is {engines} and bucket_bytes {bucket_bytes}; both must be at least 1")
        self.engines, self.bucket_bytes, self.payload = engines, bucket_bytes, payload
        self.host, self.timeout_s = host, timeout_s
        self._group: _Group | None = None
        self._sending: threading.Thread | None = None
        self._failure: Exception | None = None
        self._windows: list[Window] = []

    def __reduce__(self) -> tuple:
        """Travels as what it was made with: groups and buffers belong to this process."""
        return NcclTransport, (self.engines, self.bucket_bytes, self.payload, self.host, self.timeout_s)

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        """Reads the weights once for the manifest; a thread reads them again for the broadcast, so they must not
        change until `wait` returns. An iterator is kept as a list. Raises what the last broadcast failed with."""
        self.wait()
        tensors = list(tensors) if isinstance(tensors, Iterator) else tensors
        entries: list[Entry] = []
        device = torch.device("cpu")
        for bucket in buckets_of(tensors, self.bucket_bytes, self.payload):
            device = bucket.items[0][1].device
            entries += describe_all(self._window(0, bucket.nbytes, device).pack(bucket))
        if self._group is None:
            self._group = _Group.host(self.engines, device, self.host, self.timeout_s)
        self._sending = threading.Thread(target=self._send, args=(tensors, device), name="weights to engines")
        self._sending.daemon = True
        self._sending.start()
        manifest = Manifest(version, tuple(entries))
        return Published(manifest, self.bucket_bytes, self.engines, self._group.meeting, self._group.backend)

    def wait(self) -> None:
        """Returns once the last publication has been broadcast: the weights may change. Raises what went wrong."""
        if self._sending is not None:
            self._sending.join()
            self._sending = None
        if self._failure is not None:
            failure, self._failure, self._group = self._failure, None, None
            raise RuntimeError(f"the broadcast of the weights failed: {failure}") from failure

    def manifest(self, handle: Published) -> Manifest:
        return handle.manifest

    def receive(self, handle: Published) -> Received:
        return Received(handle.manifest, self._tensors(handle))

    def close(self) -> None:
        self._group, self._windows = None, []

    def plain_broadcast(self, nbytes: int, device: torch.device) -> None:
        """Broadcasts that many bytes in one piece, without weights: what a transfer costs at the least. Trainer and
        engines call it together after a first publication."""
        assert self._group is not None
        self._group.broadcast(torch.empty(nbytes, dtype=torch.uint8, device=device)).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _send(self, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            works: list[Any] = []
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            if stream is not None:
                stream.wait_stream(torch.cuda.default_stream(device))
            with torch.cuda.stream(stream):
                for index, bucket in enumerate(buckets_of(tensors, self.bucket_bytes, self.payload)):
                    if index >= _IN_FLIGHT:
                        works[index - _IN_FLIGHT].wait()  # on a GPU the stream waits, not this thread
                    window = self._window(index % _IN_FLIGHT, bucket.nbytes, device)
                    window.pack(bucket)
                    works.append(self._group.broadcast(window.buffer[: bucket.nbytes]))
                for work in works[-_IN_FLIGHT:]:
                    work.wait()
            if stream is not None:
                stream.synchronize()
        except Exception as error:  # told by `wait`, on the trainer's own thread
            self._failure = error

    def _tensors(self, handle: Published) -> Iterator[tuple[str, Tensor]]:
        device = torch.device("cuda", torch.cuda.current_device()) if handle.backend == "nccl" else torch.device("cpu")
        if self._group is None or self._group.meeting != handle.meeting:
            self._group = _Group.join(handle, device, self.timeout_s)
        buckets = buckets_of_entries(handle.manifest.entries, handle.bucket_bytes)
        works: list[Any] = []

        def begin(index: int) -> None:
            bucket = buckets[index]
            window = self._window(index % _IN_FLIGHT, bucket.nbytes, device)
            works.append(self._group.broadcast(window.buffer[: bucket.nbytes]))

        index, broken = 0, False
        try:
            for ahead in range(min(_IN_FLIGHT - 1, len(buckets))):
                begin(ahead)
            for index, bucket in enumerate(buckets):
                # The next one travels meanwhile, into the other buffer, behind the copies that still read there.
                if index + _IN_FLIGHT - 1 < len(buckets):
                    begin(index + _IN_FLIGHT - 1)
                works[index].wait()
                tensors = self._windows[index % _IN_FLIGHT].unpack(bucket)
                verify_all(bucket.items, tensors)
                for entry, tensor in zip(bucket.items, tensors, strict=True):
                    yield entry.name, tensor
        except RuntimeError as error:
            self._group, broken = None, True
            raise CorruptWeights(f"weights did not arrive: the broadcast of bucket {index} failed: {error}") from error
        finally:
            for late in range(len(buckets) if broken else len(works), len(buckets)):
                begin(late)  # whoever gives up early still takes part to the end
                works[late].wait()

    def _window(self, slot: int, nbytes: int, device: torch.device) -> Window:
        while len(self._windows) <= slot:
            self._windows.append(Window(torch.empty(0, dtype=torch.uint8, device=device)))
        if len(self._windows[slot].buffer) < nbytes or self._windows[slot].buffer.device != device:
            size = nbytes if 2 * nbytes <= self.bucket_bytes else max(nbytes, self.bucket_bytes)
            self._windows[slot] = Window(torch.empty(size, dtype=torch.uint8, device=device))
        return self._windows[slot]


class _Group:
    """A process group of the trainer (rank 0) and its engines, outside torch's global ones."""

    def __init__(self, store: Any, rank: int, size: int, backend: str, meeting: str, timeout_s: float):
        self.backend, self.meeting, self._store = backend, meeting, store
        self._rank, self._size, self._timeout = rank, size, timedelta(seconds=timeout_s)
        self._members: Any = None

    def _joined(self) -> Any:
        """Torch's group, made when the first broadcast begins: gloo's waits there until everybody has come."""
        if self._members is not None:
            return self._members
        if self.backend == "nccl":
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast on shared hosts can take their GPUs down
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._members = dist.ProcessGroupNCCL(self._store, self._rank, self._size, options)
        else:
            self._members = dist.ProcessGroupGloo(self._store, self._rank, self._size, self._timeout)
        return self._members

    @staticmethod
    def host(engines: int, device: torch.device, host: str | None, timeout_s: float) -> _Group:
        """The trainer's end of a new group."""
        size, backend = 1 + engines, "nccl" if device.type == "cuda" else "gloo"
        if host is None:
            handle, meeting = tempfile.mkstemp(prefix="rlzero-weights-")
            os.close(handle)
            Path(meeting).unlink()  # the store makes it, and removes it with its last member
            store = dist.FileStore(meeting, size)
        else:
            store = dist.TCPStore(host, 0, size, True, timedelta(seconds=timeout_s), wait_for_workers=False)
            meeting = f"{host}:{store.port}"
        return _Group(store, 0, size, backend, meeting, timeout_s)

    @staticmethod
    def join(handle: Published, device: torch.device, timeout_s: float) -> _Group:
        """An engine's end of the group that `handle` names."""
        size = 1 + handle.engines
        host, _, port = handle.meeting.rpartition(":")
        if host:
            store = dist.TCPStore(host, int(port), size, False, timedelta(seconds=timeout_s))
        else:
            store = dist.FileStore(handle.meeting, size)
        rank = store.add("engines", 1)
        if rank > handle.engines:
            raise CorruptWeights(
                f"weights cannot arrive: {handle.engines} engines receive from this trainer and this is one more (one "
                "that was started again has to wait for a new group)"
            )
        return _Group(store, rank, size, handle.backend, handle.meeting, timeout_s)

    def broadcast(self, buffer: Tensor) -> Any:
        """Starts to fill every member's `buffer` with the trainer's."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._joined().broadcast([buffer], options)
