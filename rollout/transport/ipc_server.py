"""The trainer's end of weights between processes of one device (rollout.transport.ipc): the buffers that others map, a
thread that answers engines, and the sending of what is gathered."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.transport.base import Checks, Layout, Manifest, layout_of
from rollout.transport.buckets import Bucket, Window, buckets_of, sources
from rollout.transport.payload import travelling

if TYPE_CHECKING:
    from rollout.transport.ipc import IpcTransport

_SHARED_MEMORY = "/dev/shm"
_ROUND_BYTES = 1 << 20  # buffers are whole multiples
_ASK_S = 0.1  # how often a sender asks whether the engines that have not come are still awaited


class NotReached(RuntimeError):
    """Not every engine has what was sent. The message says why."""


@dataclass(frozen=True)
class Published:
    """What an engine needs to fetch one publication: `device` is the GPU's UUID, or "cpu"."""

    manifest: Manifest = field(repr=False)
    bucket_bytes: int
    device: str
    address: str
    key: bytes = field(repr=False)


class Buffer:
    """Memory that other processes map. On a CPU a file in shared memory, else device memory of torch's allocator."""

    _count = 0

    def __init__(self, nbytes: int, device: torch.device, folder: Path):
        Buffer._count += 1
        self.number = Buffer._count
        if device.type == "cuda":
            self._path = None
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self._path = str(folder / str(self.number))
            with open(self._path, "wb") as file:  # or the first write where shared memory is full ends the process
                os.posix_fallocate(file.fileno(), 0, nbytes)
            memory = torch.from_file(self._path, shared=True, size=nbytes, dtype=torch.uint8)
        self.window = Window(memory)

    def shared(self) -> Any:
        """Picklable; every call is for one process more that maps the buffer."""
        if self._path is not None:
            return self._path, len(self.window.buffer)
        from torch.multiprocessing.reductions import reduce_tensor

        return reduce_tensor(self.window.buffer)[1]


def uuid_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


@dataclass(eq=False)
class Taker:
    """An engine that takes what is sent, and the buffers that it has mapped."""

    connection: Connection
    known: set[int]


class Server:
    """The trainer's side: buffers, and a thread that packs buckets for whoever asks."""

    def __init__(self, options: IpcTransport):
        self.options = options
        self.key = secrets.token_bytes(16)
        self.address = f"\0rlzero-weights-{secrets.token_hex(8)}"  # Linux's abstract names: no file to leave behind
        self._folder = Path(tempfile.mkdtemp(prefix="rlzero-ipc-", dir=_SHARED_MEMORY))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._buffers: list[Buffer] = []
        self._busy = threading.Lock()  # held while weights are read
        self._layout: Layout = []
        self._buckets: list[Bucket] = []
        self._tensors: list[tuple[str, Tensor]] = []
        self._version: int | None = None
        self._offered: int | None = None  # the version that `send` will bring
        self.sent: list[int] = []  # the fingerprints of what the last `send` brought, modulo 2^64
        self._takers: queue.SimpleQueue[Taker] = queue.SimpleQueue()
        self._packed: list[Buffer] = []  # the whole publication, where the buffers hold it
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._listener = Listener(self.address, "AF_UNIX", backlog=64, authkey=self.key)
        self._thread = threading.Thread(target=self._serve, name="weights to engines", daemon=True)
        self._thread.start()

    def publish(self, tensors: list[tuple[str, Tensor]], version: int) -> Published:
        with self._busy:
            self._version, self._tensors = None, tensors
            device = tensors[0][1].device if tensors else torch.device("cpu")
            self._plan(layout_of(tensors), device)
            self._packed, checks = [], Checks()
            for index, (bucket, taken) in enumerate(sources(self._buckets, self._layout, tensors)):
                self._packed.append(self._buffer(index, bucket))
                self._packed[-1].window.pack(bucket, taken)
                numbers = self._packed[-1].window.numbers(bucket)
                checks.add(bucket.entries, numbers, numbers)
            entries = checks.finish()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if len(self._packed) > self.options.buffers:
                self._packed = []
            else:
                self._tensors = []
            self._version = version
        return self._published(Manifest(version, entries))

    def offer(self, layout: Layout, version: int, device: torch.device) -> Published:
        with self._busy:
            self._version, self._tensors, self._packed = None, [], []
            self._plan(layout, device)
            self._hang_up("the trainer offered another version meanwhile")
            self._offered = version
        return self._published(Manifest(version, travelling(self._layout, self.options.payload)))

    def _plan(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device, self._offered = layout, device, None
        self._buckets = buckets_of(travelling(layout, self.options.payload), self.options.bucket_bytes)
        if self.options.payload is None:
            self._buckets = _one_by_one(tuple(self._buckets))

    def _published(self, manifest: Manifest) -> Published:
        return Published(manifest, self.options.bucket_bytes, uuid_of(self._device), self.address, self.key)

    def send(self, tensors: Iterable[tuple[str, Tensor]], awaited: Callable[[], bool]) -> None:
        version = self._offered
        if version is None:
            raise RuntimeError("nothing was offered: call offer before each send")
        takers, lost = self._arrived(awaited)
        self.sent = []
        try:
            for index, (bucket, taken) in enumerate(sources(self._buckets, self._layout, tensors)):
                if index >= self.options.buffers:
                    self._all_done(takers, index - self.options.buffers, lost)
                if takers:
                    self._send_bucket(takers, index, bucket, taken, lost)
            for last in range(max(0, len(self._buckets) - self.options.buffers), len(self._buckets)):
                self._all_done(takers, last, lost)
        except BaseException as error:
            for taker in takers:
                _tell(taker.connection, f"{type(error).__name__} while sending: {error}")
            raise
        finally:
            self._offered = None
            for taker in takers:
                taker.connection.close()
            self._hang_up("the weights had been sent already")
        if lost:
            raise NotReached(
                f"version {version} of the weights reached {self.options.engines - len(lost)} of "
                f"{self.options.engines} engines: {'; '.join(lost)}"
            )

    def _arrived(self, awaited: Callable[[], bool]) -> tuple[list[Taker], list[str]]:
        """The engines that came for what was offered, and a line for each that did not."""
        takers: list[Taker] = []
        begun_s = time.monotonic()
        while len(takers) < self.options.engines:
            left_s = self.options.timeout_s - (time.monotonic() - begun_s) if awaited() else 0.0
            try:
                takers.append(self._takers.get(timeout=min(max(0.0, left_s), _ASK_S)))
            except queue.Empty:
                if left_s <= 0:
                    break
        why = f"one never came within {self.options.timeout_s:g} s" if awaited() else "one ended and had not come"
        return takers, [why] * (self.options.engines - len(takers))

    def _send_bucket(
        self, takers: list[Taker], index: int, bucket: Bucket, taken: list[Tensor | None], lost: list[str]
    ) -> None:
        buffer = self._buffer(index, bucket)
        buffer.window.pack(bucket, taken)
        numbers = buffer.window.numbers(bucket).tolist()  # on a GPU this waits until the bucket is packed
        self.sent += numbers
        for taker in list(takers):
            shared = None if buffer.number in taker.known else buffer.shared()
            taker.known.add(buffer.number)
            try:
                taker.connection.send(("bucket", index, buffer.number, shared, numbers))
            except OSError:
                self._lose(takers, taker, f"one hung up before bucket {index}", lost)

    def _all_done(self, takers: list[Taker], index: int, lost: list[str]) -> None:
        """Waits until every engine is done with bucket `index`; those that keep it too long are left behind."""
        for taker in list(takers):
            try:
                self._await(taker.connection, index)
            except TimeoutError as error:
                self._lose(takers, taker, str(error), lost)
            except (EOFError, OSError):
                self._lose(takers, taker, f"one hung up before it had bucket {index}", lost)

    def _lose(self, takers: list[Taker], taker: Taker, why: str, lost: list[str]) -> None:
        takers.remove(taker)
        taker.connection.close()
        lost.append(why)

    def _hang_up(self, why: str) -> None:
        """On engines that came and were not served."""
        with contextlib.suppress(queue.Empty):
            while True:
                late = self._takers.get_nowait().connection
                _tell(late, why)
                late.close()

    def close(self) -> None:
        self._version = self._offered = None
        self._listener.close()
        self._hang_up("the trainer ended")
        with self._busy:
            self._buffers.clear()
            self._packed, self._tensors = [], []

    def _buffer(self, index: int, bucket: Bucket) -> Buffer:
        """The buffer that bucket `index` goes to, large enough for it and on the weights' device."""
        slot = index % self.options.buffers
        size = bucket.nbytes if 2 * bucket.nbytes <= self.options.bucket_bytes else self.options.bucket_bytes
        size = -(-max(bucket.nbytes, size) // _ROUND_BYTES) * _ROUND_BYTES
        if slot == len(self._buffers):
            self._buffers.append(Buffer(size, self._device, self._folder))
        held = self._buffers[slot].window.buffer
        if len(held) < bucket.nbytes or held.device != self._device:
            self._buffers[slot] = Buffer(size, self._device, self._folder)
        return self._buffers[slot]

    def _serve(self) -> None:
        while True:
            try:
                engine = self._listener.accept()
            except OSError:  # the listener was closed
                return
            except Exception:  # somebody knocked without the key
                continue
            kept = False
            try:
                version, known = engine.recv()
                with self._busy:
                    if version == self._offered:
                        self._takers.put(Taker(engine, set(known)))
                        kept = True
                    else:
                        self._serve_one(engine, version, set(known))
            except (EOFError, OSError):
                pass  # the engine went away; what it says about that reaches the run there
            except Exception as error:
                _tell(engine, f"{type(error).__name__} while packing: {error}")
            finally:
                if not kept:
                    engine.close()

    def _serve_one(self, engine: Connection, version: int, known: set[int]) -> None:
        if version != self._version:
            newest = self._version if self._offered is None else self._offered
            _tell(engine, f"version {version} is no longer offered; the newest is {newest}")
            return
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):  # a no-op without one
            count = 0
            for buffer in self._packed or self._repacked(engine):
                shared = None if buffer.number in known else buffer.shared()
                known.add(buffer.number)
                engine.send(("bucket", count, buffer.number, shared, None))
                count += 1
            for last in range(max(0, count - self.options.buffers), count):
                self._await(engine, last)

    def _repacked(self, engine: Connection) -> Iterator[Buffer]:
        """The buffers with one bucket after the other in them, each as soon as the engine has left it."""
        for index, (bucket, taken) in enumerate(sources(self._buckets, self._layout, self._tensors)):
            if index >= self.options.buffers:
                self._await(engine, index - self.options.buffers)
            buffer = self._buffer(index, bucket)
            buffer.window.pack(bucket, taken)
            if self._stream is not None:
                self._stream.synchronize()
            yield buffer

    def _await(self, engine: Connection, index: int) -> None:
        """Waits until the engine is done with bucket `index`."""
        if not engine.poll(self.options.timeout_s):
            raise TimeoutError(f"one kept bucket {index} for more than {self.options.timeout_s:g} s")
        engine.recv()


@lru_cache(maxsize=8)  # sync after sync the same objects: windows keep what they know of a bucket
def _one_by_one(buckets: tuple[Bucket, ...]) -> list[Bucket]:
    """The buckets for tensors that travel as they are: FP8 weights and their scales come one by one, too."""
    return [replace(bucket, groups=[(entry,) for entry in bucket.entries]) for bucket in buckets]


def _tell(engine: Connection, message: str) -> None:
    try:
        engine.send(("error", message))
    except OSError:
        pass
