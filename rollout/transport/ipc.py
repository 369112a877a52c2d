"""Weights between processes that share a device: CUDA IPC on a GPU, shared memory on a CPU. Handles travel, not data.

The sender packs its tensors into a few buffers of bounded size, one bucket after the other, and packs the next bucket
while its receivers copy the one before. Buffers stay from sync to sync; each sync has a socket of its own, which is
gone when the sync is over. A receiver that never comes or goes away is left behind when `timeout_s` has passed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import Checks, CorruptWeights, Layout, Received, Tensors, WeightUpdate
from rollout.transport.buckets import BUCKET_BYTES, Bucket, BucketViews, buckets_of, filled, largest
from rollout.transport.payload import Payload, travelling

_SHARED_MEMORY = "/dev/shm"
_ROUND_BYTES = 1 << 20  # buffers are whole multiples


@dataclass(frozen=True)
class IpcUpdate(WeightUpdate):
    """`device` is the GPU's UUID, or "cpu"; `address` the sender's socket."""

    device: str
    address: str


class IpcSender:
    """Serves `receivers` processes (0: this rank only gathers) with what it sends from `device`.

    `buffers` buffers of the size of the largest bucket are taken on the first sync and kept. `payload` is the form that
    tensors are packed in; `timeout_s` is how long a receiver is waited for."""

    def __init__(
        self,
        device: torch.device,
        receivers: int = 1,
        payload: Payload = None,
        bucket_bytes: int = BUCKET_BYTES,
        buffers: int = 2,
        timeout_s: float = 120.0,
    ):
        self.device, self.receivers, self.payload = device, receivers, payload
        self.bucket_bytes, self.timeout_s = bucket_bytes, timeout_s
        self._count, self._buffers = buffers, []
        self._layout: Layout = []
        self._update: IpcUpdate | None = None
        self._listener: socket.socket | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="rlzero-weights-", dir=_SHARED_MEMORY))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def prepare(self, layout: Layout, version: int, owners: Sequence[int] | None = None) -> IpcUpdate:
        """See `Sender`. Every rank that sends has all tensors, whoever owns them."""
        self._hang_up()
        address = f"\0rlzero-weights-{secrets.token_hex(16)}"  # Linux's abstract names: no file to leave behind
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._layout = list(layout)
        specs = travelling(layout, self.payload)
        self._update = IpcUpdate(version, specs, self.bucket_bytes, uuid_of(self.device), address)
        return self._update

    def send(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """See `Sender`."""
        if self._update is None:
            raise RuntimeError("no update was prepared: call prepare before each send")
        update, lost = self._update, []
        buckets, peers = buckets_of(update.specs, self.bucket_bytes), self._arrived(lost)
        try:
            if peers:
                self._allocate(largest(buckets))
            for index, (bucket, taken) in enumerate(filled(buckets, self._layout, tensors)):
                if index >= self._count:
                    _await(peers, index - self._count, self.timeout_s, lost)
                if peers:
                    self._send_bucket(peers, index, bucket, taken, lost)
            for last in range(max(0, len(buckets) - self._count), len(buckets)):
                _await(peers, last, self.timeout_s, lost)
        except BaseException as error:
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.connection.send(("error", f"{type(error).__name__} while sending: {error}"))
            raise
        finally:
            self._hang_up()
            for peer in peers:
                peer.connection.close()
        if lost:
            raise RuntimeError(
                f"version {update.version} of the weights reached {self.receivers - len(lost)} of {self.receivers} "
                f"engines: {'; '.join(lost)}"
            )

    def close(self) -> None:
        """Frees the buffers."""
        self._hang_up()
        self._buffers = []

    def _hang_up(self) -> None:
        """Whoever comes from now on for what was prepared finds nobody."""
        self._update = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _arrived(self, lost: list[str]) -> list[_Peer]:
        """The receivers that came; a line in `lost` for each that did not."""
        peers: list[_Peer] = []
        until_s = time.monotonic() + self.timeout_s
        while len(peers) < self.receivers and (left_s := until_s - time.monotonic()) > 0:
            self._listener.settimeout(left_s)
            try:
                accepted, _ = self._listener.accept()
                accepted.setblocking(True)
                user = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
                connection = Connection(accepted.detach())
                if user == os.geteuid() and connection.poll(left_s):
                    peers.append(_Peer(connection, set(connection.recv())))
            except (OSError, EOFError):  # nobody came, or it went away again
                continue
        lost += [f"one never came within {self.timeout_s:g} s"] * (self.receivers - len(peers))
        return peers

    def _allocate(self, nbytes: int) -> None:
        """Buffers that each hold so much, where those of the last sync do not."""
        if not self._buffers or len(self._buffers[0].views.buffer) < nbytes:
            nbytes = max(1, -(-nbytes // _ROUND_BYTES)) * _ROUND_BYTES
            self._buffers = [_Buffer(nbytes, self.device, self._folder) for _ in range(self._count)]

    def _send_bucket(
        self, peers: list[_Peer], index: int, bucket: Bucket, taken: list[Tensor | None], lost: list[str]
    ) -> None:
        buffer = self._buffers[index % self._count]
        buffer.views.pack(bucket, taken)
        numbers = buffer.views.checksums(bucket).tolist()  # on a GPU this waits until the bucket is packed
        for peer in list(peers):
            shared = None if buffer.id in peer.mapped else buffer.shared()
            peer.mapped.add(buffer.id)
            try:
                peer.connection.send(("bucket", index, buffer.id, shared, numbers))
            except OSError:
                _lose(peers, peer, f"one hung up before bucket {index}", lost)


@dataclass(eq=False)
class _Peer:
    """A receiver and the buffers that it has mapped."""

    connection: Connection
    mapped: set[str]


def _await(peers: list[_Peer], index: int, timeout_s: float, lost: list[str]) -> None:
    """Waits until every receiver is done with bucket `index`; those that keep it too long are left behind."""
    for peer in list(peers):
        try:
            if peer.connection.poll(timeout_s):
                peer.connection.recv()
            else:
                _lose(peers, peer, f"one kept bucket {index} for more than {timeout_s:g} s", lost)
        except (EOFError, OSError):
            _lose(peers, peer, f"one hung up before it had bucket {index}", lost)


def _lose(peers: list[_Peer], peer: _Peer, why: str, lost: list[str]) -> None:
    peers.remove(peer)
    peer.connection.close()
    lost.append(why)


class _Buffer:
    """Memory that other processes map. On a CPU a file in shared memory, else device memory of torch's allocator."""

    def __init__(self, nbytes: int, device: torch.device, folder: Path):
        self.id = secrets.token_hex(8)
        if device.type == "cuda":
            self._path = None
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self._path = str(folder / self.id)
            with open(self._path, "wb") as file:  # or the first write where shared memory is full ends the process
                os.posix_fallocate(file.fileno(), 0, nbytes)
            memory = torch.from_file(self._path, shared=True, size=nbytes, dtype=torch.uint8)
        self.views = BucketViews(memory)

    def shared(self) -> Any:
        """Picklable; every call is for one process more that maps the buffer."""
        if self._path is not None:
            return self._path, len(self.views.buffer)
        from torch.multiprocessing.reductions import reduce_tensor

        return reduce_tensor(self.views.buffer)[1]


def uuid_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


class IpcReceiver:
    """Receives in a process that sees the sender's device. `timeout_s` is the sender's: twice that is waited."""

    def __init__(self, timeout_s: float = 120.0):
        self.timeout_s = timeout_s
        self._mapped: dict[str, BucketViews] = {}  # by the buffer's id

    def receive(self, update: IpcUpdate) -> Received:
        checks = Checks()
        return Received(update.specs, self._buckets(update, checks), checks)

    def close(self) -> None:
        """Unmaps the buffers."""
        self._mapped.clear()

    def _buckets(self, update: IpcUpdate, checks: Checks) -> Iterator[Tensors]:
        device = _device_of(update.device)
        try:
            sender = Client(update.address, "AF_UNIX")
        except OSError as error:
            raise CorruptWeights(f"weights cannot arrive: the trainer that prepared them is gone ({error})") from error
        with sender:
            sender.send(list(self._mapped))
            for index, bucket in enumerate(buckets_of(update.specs, update.bucket_bytes)):
                buffer_id, shared, sent = self._expect(sender, index)
                views = self._views(buffer_id, shared, device, index)
                checks.add(bucket.specs, views.checksums(bucket), sent)
                yield views.named(bucket)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # the copies out of this buffer are done
                with contextlib.suppress(BrokenPipeError):  # why it hung up stands in what it sent last
                    sender.send(index)
        checks.finish()

    def _expect(self, sender: Connection, index: int) -> tuple[str, Any, list[int]]:
        patience_s = 2 * self.timeout_s  # the trainer's rank may be waiting for another one, and that for its engine
        if not sender.poll(patience_s):
            raise CorruptWeights(f"weights did not arrive: the trainer sent no bucket {index} for {patience_s:g} s")
        try:
            kind, *content = sender.recv()
        except (EOFError, ConnectionError) as error:
            raise CorruptWeights(f"weights did not arrive: the trainer hung up before bucket {index}") from error
        if kind == "error":
            raise CorruptWeights(f"weights did not arrive: {content[0]}. Send the weights again.")
        found, buffer_id, shared, sent = content
        if found != index:
            raise CorruptWeights(f"weights arrived out of order: bucket {found}, expected {index}")
        return buffer_id, shared, sent

    def _views(self, buffer_id: str, shared: Any, device: torch.device, index: int) -> BucketViews:
        if shared is not None:
            if index == 0:  # what is mapped already was replaced, or is of a sender that is gone
                self._mapped.clear()
            self._mapped[buffer_id] = BucketViews(_map(shared, device))
        return self._mapped[buffer_id]


def _map(shared: Any, device: torch.device) -> Tensor:
    """The buffer, as a tensor of this device."""
    if device.type == "cpu":
        path, nbytes = shared
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(shared)
    arguments[6] = device.index  # the trainer's number of the device; it may have another one here
    return rebuild_cuda_tensor(*arguments)


def _device_of(uuid: str) -> torch.device:
    """This process's name for the device. Raises CorruptWeights where it cannot see it."""
    if uuid == "cpu":
        return torch.device("cpu")
    seen = [uuid_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise CorruptWeights(
            f"weights cannot arrive: they lie on GPU {uuid}, this process sees {', '.join(seen) or 'none'}. CUDA IPC "
            "is for engines on the trainer's own GPU; choose another transport for this placement"
        )
    return torch.device("cuda", seen.index(uuid))
