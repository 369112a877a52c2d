"""Weights between processes that share a device: CUDA IPC on a GPU, shared memory on a CPU. Handles travel, not data.

The trainer packs its tensors into a few buffers of bounded size, one bucket after the other, and packs the next bucket
while the engine installs the one before; neither side ever holds a second copy of the model. What fits into the
buffers as a whole is packed once. Otherwise `publish` reads the weights to write the manifest and a thread packs them
again for every engine that asks, so they must not change until `receive` has ended: where they do, the fingerprints
say so."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.transport.base import CorruptWeights, Entry, Manifest, Received, describe_all, verify_all
from rollout.transport.buckets import BUCKET_BYTES, Bucket, Window, buckets_of, buckets_of_entries

_SHARED_MEMORY = "/dev/shm"
_ROUND_BYTES = 1 << 20  # buffers are whole multiples


@dataclass(frozen=True)
class Published:
    """What an engine needs to fetch one publication: `device` is the GPU's UUID, or "cpu"."""

    manifest: Manifest = field(repr=False)
    bucket_bytes: int
    device: str
    address: str
    key: bytes = field(repr=False)


class IpcTransport:
    """`publish` on the trainer's device, `receive` in a process that sees the same device.

    `buffers` buffers of `bucket_bytes` each are taken on the first `publish` and kept (a tensor larger than that
    makes them as large as it). `payload` casts floating-point tensors while they are packed (None: they travel as
    they are); `timeout_s` is how long either side waits for the other before it gives up."""

    def __init__(
        self,
        bucket_bytes: int = BUCKET_BYTES,
        buffers: int = 2,
        payload: torch.dtype | None = None,
        timeout_s: float = 120.0,
    ):
        if bucket_bytes < 1 or buffers < 1:
            raise ValueError(f"bucket_bytes is {bucket_bytes} and buffers {buffers}; both must be at least 1")
        self.bucket_bytes, self.buffers, self.payload, self.timeout_s = bucket_bytes, buffers, payload, timeout_s
        self._server: _Server | None = None
        self._attached: dict[tuple[str, int], Window] = {}

    def __reduce__(self) -> tuple:
        """Travels as what it was made with: its buffers and threads belong to this process."""
        return IpcTransport, (self.bucket_bytes, self.buffers, self.payload, self.timeout_s)

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        """An iterator (rather than a list or another thing that can be gone through twice) is kept as a list."""
        if self._server is None:
            self._server = _Server(self)
        return self._server.publish(list(tensors) if isinstance(tensors, Iterator) else tensors, version)

    def manifest(self, handle: Published) -> Manifest:
        return handle.manifest

    def receive(self, handle: Published) -> Received:
        return Received(handle.manifest, self._tensors(handle))

    def close(self) -> None:
        """Frees the buffers. Publications that were not received are gone."""
        self._attached.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _tensors(self, handle: Published) -> Iterator[tuple[str, Tensor]]:
        device = _device_of(handle.device)
        known = [number for address, number in self._attached if address == handle.address]
        with Client(handle.address, "AF_UNIX", authkey=handle.key) as server:
            server.send((handle.manifest.version, known))
            for index, bucket in enumerate(buckets_of_entries(handle.manifest.entries, handle.bucket_bytes)):
                number, shared = self._expect(server, index)
                window = self._window(handle.address, number, shared, device)
                tensors = window.unpack(bucket)
                verify_all(bucket.items, tensors)
                for entry, tensor in zip(bucket.items, tensors, strict=True):
                    yield entry.name, tensor
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # the copies out of this buffer are done
                with contextlib.suppress(BrokenPipeError):  # why it hung up stands in what it sent last
                    server.send(index)

    def _expect(self, server: Connection, index: int) -> tuple[int, Any]:
        if not server.poll(self.timeout_s):
            raise CorruptWeights(f"weights did not arrive: the trainer sent no bucket {index} for {self.timeout_s:g} s")
        try:
            kind, *content = server.recv()
        except (EOFError, ConnectionError) as error:
            raise CorruptWeights(f"weights did not arrive: the trainer hung up before bucket {index}") from error
        if kind == "error":
            raise CorruptWeights(f"weights did not arrive: {content[0]}. Publish the weights again.")
        found, number, shared = content
        if found != index:
            raise CorruptWeights(f"weights arrived out of order: bucket {found}, expected {index}")
        return number, shared

    def _window(self, address: str, number: int, shared: Any, device: torch.device) -> Window:
        if shared is not None:
            # Buffers of a trainer that is gone, or that replaced them, are of no more use.
            self._attached = {k: w for k, w in self._attached.items() if k[0] == address}
            self._attached[address, number] = Window(_attach(shared, device))
        return self._attached[address, number]


class _Buffer:
    """Memory that other processes map. On a CPU a file in shared memory, else device memory of torch's allocator."""

    _count = 0

    def __init__(self, nbytes: int, device: torch.device, folder: Path):
        _Buffer._count += 1
        self.number = _Buffer._count
        if device.type == "cuda":
            self._path = None
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self._path = str(folder / str(self.number))
            memory = torch.from_file(self._path, shared=True, size=nbytes, dtype=torch.uint8)
        self.window = Window(memory)

    def shared(self) -> Any:
        """Picklable; every call is for one process more that maps the buffer."""
        if self._path is not None:
            return self._path, len(self.window.buffer)
        from torch.multiprocessing.reductions import reduce_tensor

        return reduce_tensor(self.window.buffer)[1]


def _attach(shared: Any, device: torch.device) -> Tensor:
    if device.type == "cpu":
        path, nbytes = shared
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(shared)
    arguments[6] = device.index  # the trainer's number of the device; it may have another one here
    return rebuild_cuda_tensor(*arguments)


def _uuid(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def _device_of(uuid: str) -> torch.device:
    """This process's name for the device. Raises CorruptWeights where it cannot see it."""
    if uuid == "cpu":
        return torch.device("cpu")
    seen = [_uuid(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise CorruptWeights(
            f"weights cannot arrive: they lie on GPU {uuid}, this process sees {', '.join(seen) or 'none'}. CUDA IPC "
            "is for engines on the trainer's own GPU; choose another transport for this placement"
        )
    return torch.device("cuda", seen.index(uuid))


class _Server:
    """The trainer's side: buffers, and a thread that packs buckets for whoever asks."""

    def __init__(self, options: IpcTransport):
        self.options = options
        self.key = secrets.token_bytes(16)
        self.address = f"\0rlzero-weights-{secrets.token_hex(8)}"  # Linux's abstract names: no file to leave behind
        self._folder = Path(tempfile.mkdtemp(prefix="rlzero-ipc-", dir=_SHARED_MEMORY))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._buffers: list[_Buffer] = []
        self._busy = threading.Lock()  # held while weights are read
        self._tensors: Iterable[tuple[str, Tensor]] = ()
        self._version: int | None = None
        self._packed: list[_Buffer] = []  # the whole publication, where the buffers hold it
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._listener = Listener(self.address, "AF_UNIX", backlog=64, authkey=self.key)
        self._thread = threading.Thread(target=self._serve, name="weights to engines", daemon=True)
        self._thread.start()

    def publish(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Published:
        with self._busy:
            self._version, self._tensors = None, tensors
            entries: list[Entry] = []
            self._packed = []
            for index, bucket in enumerate(self._buckets()):
                self._packed.append(self._buffer(index, bucket))
                entries += describe_all(self._packed[-1].window.pack(bucket))
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if len(self._packed) > self.options.buffers:
                self._packed = []
            else:
                self._tensors = ()
            self._version = version
        manifest = Manifest(version, tuple(entries))
        return Published(manifest, self.options.bucket_bytes, _uuid(self._device), self.address, self.key)

    def close(self) -> None:
        self._version = None
        self._listener.close()
        with self._busy:
            self._buffers.clear()
            self._packed, self._tensors = [], ()

    def _buckets(self) -> Iterator[Bucket]:
        return buckets_of(self._tensors, self.options.bucket_bytes, self.options.payload)

    def _buffer(self, index: int, bucket: Bucket) -> _Buffer:
        """The buffer that bucket `index` goes to, large enough for it."""
        device = bucket.items[0][1].device
        slot = index % self.options.buffers
        size = bucket.nbytes if 2 * bucket.nbytes <= self.options.bucket_bytes else self.options.bucket_bytes
        size = -(-max(bucket.nbytes, size) // _ROUND_BYTES) * _ROUND_BYTES
        if slot == len(self._buffers):
            self._device = device
            self._buffers.append(_Buffer(size, device, self._folder))
        elif len(self._buffers[slot].window.buffer) < bucket.nbytes or device != self._device:
            self._device = device
            self._buffers[slot] = _Buffer(size, device, self._folder)
        return self._buffers[slot]

    def _serve(self) -> None:
        while True:
            try:
                engine = self._listener.accept()
            except OSError:  # the listener was closed
                return
            except Exception:  # somebody knocked without the key
                continue
            with engine:
                try:
                    with self._busy:
                        self._send(engine)
                except (EOFError, OSError):
                    pass  # the engine went away; what it says about that reaches the run there
                except Exception as error:
                    _tell(engine, f"{type(error).__name__} while packing: {error}")

    def _send(self, engine: Connection) -> None:
        version, known = engine.recv()
        if version != self._version:
            _tell(engine, f"version {version} is no longer offered; the newest is {self._version}")
            return
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        known = set(known)
        with torch.cuda.stream(self._stream):  # a no-op without one
            count = 0
            for buffer in self._packed or self._repacked(engine):
                shared = None if buffer.number in known else buffer.shared()
                known.add(buffer.number)
                engine.send(("bucket", count, buffer.number, shared))
                count += 1
            for last in range(max(0, count - self.options.buffers), count):
                self._await(engine, last)

    def _repacked(self, engine: Connection) -> Iterator[_Buffer]:
        """The buffers with one bucket after the other in them, each as soon as the engine has left it."""
        for index, bucket in enumerate(self._buckets()):
            if index >= self.options.buffers:
                self._await(engine, index - self.options.buffers)
            buffer = self._buffer(index, bucket)
            buffer.window.pack(bucket)
            if self._stream is not None:
                self._stream.synchronize()
            yield buffer

    def _await(self, engine: Connection, index: int) -> None:
        """Waits until the engine is done with bucket `index`."""
        if not engine.poll(self.options.timeout_s):
            raise EOFError(f"the engine kept bucket {index} for more than {self.options.timeout_s:g} s")
        engine.recv()


def _tell(engine: Connection, message: str) -> None:
    try:
        engine.send(("error", message))
    except OSError:
        pass
