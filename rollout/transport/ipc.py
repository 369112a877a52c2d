"""Weights between processes that share a device: CUDA IPC on a GPU, shared memory on a CPU. Handles travel, not data.

The trainer packs its tensors into a few buffers of bounded size, one bucket after the other, and packs the next bucket
while the engine installs the one before; neither side ever holds a second copy of the model. There are two ways:

`publish` is for one rank, whose weights stay where they are: any engine may fetch them, one that was started again
too, until the next publication. What fits into the buffers as a whole is packed once. Otherwise `publish` reads the
weights for the manifest's fingerprints and a thread packs them again for every engine that asks, so they must not
change until `receive` has ended: where they do, the fingerprints say so.

`offer` and `send` are for weights that are gathered from several ranks: they are read once, for the engines that this
rank serves, each bucket with its fingerprints beside it. An engine that never comes or goes away is left behind when
`timeout_s` has passed; the rank still takes part in the gather to its end, and raises then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import Checks, CorruptWeights, Layout, Manifest, Received
from rollout.transport.buckets import BUCKET_BYTES, Window, buckets_of
from rollout.transport.ipc_server import Published, Server, uuid_of
from rollout.transport.payload import Payload


class IpcTransport:
    """`publish` or `send` on the trainer's device, `receive` in a process that sees the same device.

    `buffers` buffers of `bucket_bytes` each are taken on the first sync and kept (a tensor larger than that makes them
    as large as it). `payload` is the form that tensors are packed in; `timeout_s` is how long the trainer waits for an
    engine before it gives up, and half of how long an engine waits; `engines` is how many of them take each `send`
    (0: this rank only gathers). A receiver that computes on another GPU than the buffers' names its own in `onto`: it
    maps them there by peer access, without a CUDA context on theirs."""

    def __init__(
        self,
        bucket_bytes: int = BUCKET_BYTES,
        buffers: int = 2,
        payload: Payload = None,
        timeout_s: float = 120.0,
        engines: int = 1,
        onto: torch.device | None = None,
    ):
        if bucket_bytes < 1 or buffers < 1 or engines < 0:
            raise ValueError(
                f"bucket_bytes is {bucket_bytes}, buffers {buffers} and engines {engines}; expected at least 1, 1 and 0"
            )
        self.bucket_bytes, self.buffers, self.payload, self.timeout_s = bucket_bytes, buffers, payload, timeout_s
        self.engines, self.onto = engines, onto
        self.checks = True  # False: arriving tensors are not compared, to measure what that costs
        self._server: Server | None = None
        self._attached: dict[tuple[str, int], Window] = {}

    def __reduce__(self) -> tuple:
        """Travels as what it was made with: its buffers and threads belong to this process."""
        options = self.bucket_bytes, self.buffers, self.payload, self.timeout_s, self.engines, self.onto
        return IpcTransport, options

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        """Offers the weights to every engine that asks until the next call. They are kept as a list."""
        return self._serving().publish(list(tensors), version)

    def offer(self, layout: Layout, version: int, device: torch.device | None = None) -> Published:
        """The handle of weights that `send` will bring from `device` (default: the current GPU, where there is one)."""
        return self._serving().offer(list(layout), version, device or _current_device())

    def send(self, tensors: Iterable[tuple[str, Tensor]], awaited: Callable[[], bool] = lambda: True) -> None:
        """Brings what was offered to `engines` engines, while they receive it; see `SentTransport`. Raises NotReached.
        Engines that have not come are waited for while `awaited` says so, `timeout_s` at most."""
        if self._server is None:
            raise RuntimeError("nothing was offered: call offer before send")
        self._server.send(tensors, awaited)

    def sent(self) -> list[int]:
        """The fingerprints of what the last `send` brought, in order; fewer where no engine was left to bring it to."""
        return [] if self._server is None else [number % (1 << 64) for number in self._server.sent]

    def _serving(self) -> Server:
        if self._server is None:
            self._server = Server(self)
        return self._server

    def manifest(self, handle: Published) -> Manifest:
        return handle.manifest

    def receive(self, handle: Published) -> Received:
        manifest = Manifest(handle.manifest.version, handle.manifest.entries)
        return Received(manifest, self._tensors(handle, manifest))

    def receive_buckets(self, handle: Published) -> Iterator[list[tuple[str, Tensor]]]:
        """`receive`, a bucket at a time: its tensors hold together until the next bucket is asked for."""
        return self._buckets(handle, Manifest(handle.manifest.version, handle.manifest.entries))

    def close(self) -> None:
        """Frees the buffers. Publications that were not received are gone."""
        self._attached.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _tensors(self, handle: Published, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        with contextlib.closing(self._buckets(handle, manifest)) as buckets:
            for bucket in buckets:
                yield from bucket

    def _buckets(self, handle: Published, manifest: Manifest) -> Iterator[list[tuple[str, Tensor]]]:
        device = _device_of(handle.device, self.onto)
        known = [number for address, number in self._attached if address == handle.address]
        checks = Checks()
        with _called(handle) as server:
            server.send((manifest.version, known))
            for index, bucket in enumerate(buckets_of(handle.manifest.entries, handle.bucket_bytes)):
                number, shared, sent = self._expect(server, index)
                window = self._window(handle, number, shared, device)
                if self.checks:
                    entries = handle.manifest.entries[bucket.first : bucket.first + len(bucket.entries)]
                    published = sent or [entry.fingerprint for entry in entries]
                    checks.add(bucket.entries, window.numbers(bucket), published)
                yield [(entry.name, view) for entry, view in zip(bucket.entries, window.views(bucket), strict=True)]
                for copied_by in {device, self.onto or device}:
                    if copied_by.type == "cuda":
                        torch.cuda.current_stream(copied_by).synchronize()  # the copies out of this buffer are done
                with contextlib.suppress(BrokenPipeError):  # why it hung up stands in what it sent last
                    server.send(index)
        if self.checks:
            manifest.entries = checks.finish()

    def _expect(self, server: Connection, index: int) -> tuple[int, Any, list[int] | None]:
        patience_s = 2 * self.timeout_s  # the trainer's rank may be waiting for another one, and that for its engine
        if not server.poll(patience_s):
            raise CorruptWeights(f"weights did not arrive: the trainer sent no bucket {index} for {patience_s:g} s")
        try:
            kind, *content = server.recv()
        except (EOFError, ConnectionError) as error:
            raise CorruptWeights(f"weights did not arrive: the trainer hung up before bucket {index}") from error
        if kind == "error":
            raise CorruptWeights(f"weights did not arrive: {content[0]}. Publish the weights again.")
        found, number, shared, sent = content
        if found != index:
            raise CorruptWeights(f"weights arrived out of order: bucket {found}, expected {index}")
        return number, shared, sent

    def _window(self, handle: Published, number: int, shared: Any, device: torch.device) -> Window:
        if shared is not None:
            # Buffers of a trainer that is gone, or that replaced them, are of no more use.
            self._attached = {k: w for k, w in self._attached.items() if k[0] == handle.address}
            memory = _attach(shared, device, by_peer=handle.device != uuid_of(device))
            self._attached[handle.address, number] = Window(memory)
        return self._attached[handle.address, number]


def _attach(shared: Any, device: torch.device, by_peer: bool = False) -> Tensor:
    """The buffer, as a tensor of this device; `by_peer` where its memory is another GPU's."""
    if device.type == "cpu":
        path, nbytes = shared
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(shared)
    arguments[6] = device.index  # the trainer's number of the device; it may have another one here
    if by_peer:
        arguments[14] = False  # no waiting for the other GPU's event: a bucket is complete before it is announced
    return rebuild_cuda_tensor(*arguments)


def _device_of(uuid: str, onto: torch.device | None = None) -> torch.device:
    """This process's name for the device, or the GPU that its memory is mapped onto. Raises CorruptWeights where it
    cannot see it."""
    if uuid == "cpu":
        return torch.device("cpu")
    if onto is not None and onto.type == "cuda":
        return onto
    seen = [uuid_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise CorruptWeights(
            f"weights cannot arrive: they lie on GPU {uuid}, this process sees {', '.join(seen) or 'none'}. CUDA IPC "
            "is for engines on the trainer's own GPU; choose another transport for this placement"
        )
    return torch.device("cuda", seen.index(uuid))


def _called(handle: Published) -> Connection:
    try:
        return Client(handle.address, "AF_UNIX", authkey=handle.key)
    except OSError as error:
        raise CorruptWeights(f"weights cannot arrive: the trainer that offered them is gone ({error})") from error


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
