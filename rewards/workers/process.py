"""A warm worker process that can be killed at any moment and is back within milliseconds.

Two processes stand behind one `WarmProcess`: a *fork server*, a fresh interpreter (never a fork of the caller, which
may hold torch's threads or a GPU) that imports what the work needs and then does nothing but fork; and its *worker*,
the fork that answers requests over two pipes. When a worker hangs, the caller kills it and the fork server forks the
next one, with everything still imported. Where the imports started threads (a pool of OpenMP, a GPU's), a fork would
hang in them: each worker is then a fresh interpreter with imports of its own. The caller trusts nothing that comes
back: replies are lines of JSON, and a line that a kill cut short is dropped; requests, which only the caller writes,
are pickled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewards.sandbox import starvation

_HEAD = struct.Struct("<4sQ")  # a mark, and the length of the pickle that follows
_MARK = b"rwd1"
MAX_REPLY_BYTES = 16 << 20
START_TIMEOUT_S = 120.0
_STACK_S = 0.2  # for the worker to write where it is
# Threads of libraries do not survive a fork, and there is a worker per core: one each, whatever the caller's have.
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")} | {
    "RAYON_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
TAKE_TIMEOUT_S = 20.0  # a worker that is up and has a core reads its request at once
_FINISHED = 64  # exit status of a worker that asks to be replaced
_QUICK_DEATHS = 50  # workers in a row that end by themselves at once: nothing that a new fork would mend
_CLOSED = 65  # exit status of a worker whose caller is gone

Handler = Callable[[Any], Iterator[dict[str, Any]]]  # a request -> JSON-able replies, sent as they come


class WorkerGone(Exception):
    """The process behind the pipes ended or could not start; the message says how."""


class WarmProcess:
    """A fork server and its worker, seen from the caller. Not thread-safe: one thread talks to it.

    `target` is `module:factory`; `factory(*arguments)` is called in the fork server and returns the handler of
    requests. `memory_bytes` caps the private memory of the worker. The first message to read is
    `{"ready": pid, "about": ...}` (the handler's attribute `about`); another one follows every time the fork server has
    forked anew and carries in `ended` how the previous worker went (a negative number: the signal that killed it).
    Every request is answered by `{"started": true}`, from when on a deadline can run, and then by what the handler
    yields; a reply with `replace` set is the worker's last.
    """

    def __init__(self, target: str, arguments: tuple = (), memory_bytes: int | None = None) -> None:
        request_read, self._request = os.pipe()
        self.reply, reply_write = os.pipe()
        root = str(Path(__file__).resolve().parents[2])
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join([root, *paths])}
        # -P: a file of the current folder that is named like a module of the library must not shadow it
        main = "from rewards.workers.process import keep; keep()"
        self._stack = os.memfd_create("stack")
        passed = (request_read, reply_write, self._stack)
        command = [sys.executable, "-P", "-c", main, *map(str, passed)]
        try:
            self._fork_server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
                pass_fds=passed,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(request_read)
            os.close(reply_write)
        os.set_blocking(self.reply, False)
        self.worker_pid: int | None = None
        self._buffer = bytearray()
        self.send((target, arguments, memory_bytes))

    def send(self, request: Any) -> None:
        """Writes one request; raises WorkerGone when the fork server has ended."""
        payload = pickle.dumps(request, protocol=5)
        try:
            _write_all(self._request, _HEAD.pack(_MARK, len(payload)) + payload)
        except BrokenPipeError as error:
            raise WorkerGone(self._ending()) from error

    def receive(self) -> list[dict[str, Any]]:
        """Every complete reply that has arrived, without waiting; raises WorkerGone when the fork server has ended.
        Afterwards `worker_pid` is the worker that takes requests: None from a `replace` to its successor's `ready`."""
        closed = False
        while True:
            try:
                piece = os.read(self.reply, 1 << 16)
            except BlockingIOError:
                break
            if not piece:
                closed = True
                break
            self._buffer += piece
        if len(self._buffer) > MAX_REPLY_BYTES:
            raise WorkerGone(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        replies = []
        for line in lines:
            try:
                reply = json.loads(line) if line else None
            except ValueError:
                continue  # cut short when its worker was killed
            if reply is None:
                continue
            if "failed" in reply:
                raise WorkerGone(f"the worker process could not start:\n{reply['failed']}")
            # in the order of writing: a worker's last reply and its successor's first may come together
            if reply.get("replace"):
                self.worker_pid = None
            if "ready" in reply:
                self.worker_pid = reply["ready"]
            replies.append(reply)
        if closed and not replies:
            raise WorkerGone(self._ending())
        return replies

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """As `receive`, waiting up to `timeout_s` for the first reply; an empty list when none came."""
        deadline = time.monotonic() + timeout_s
        while not (replies := self.receive()):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.reply], [], [], left)[0]:
                return self.receive()
        return replies

    def kill_worker(self) -> None:
        """Kills the worker and what it started, at once; the fork server then forks the next one (see `receive`)."""
        if self.worker_pid is not None:
            _kill_group(self.worker_pid)
            self.worker_pid = None

    def cpu_seconds(self) -> tuple[float, str]:
        """CPU seconds that the worker has used and its state (`R` running or waiting for a core, `S` sleeping)."""
        try:
            fields = Path(f"/proc/{self.worker_pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, "X"
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0]

    def waited_s(self) -> float:
        """How long a process that the worker started (code in a sandbox) has waited for a core."""
        return 0.0 if self.worker_pid is None else starvation.waited_s(self.worker_pid)

    def stack(self) -> str:
        """Where the worker is, as Python prints a traceback (innermost first), also while C code holds the GIL; empty
        when it does not answer."""
        os.ftruncate(self._stack, 0)
        os.lseek(self._stack, 0, os.SEEK_SET)
        found, until = b"", time.monotonic() + _STACK_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker_pid, signal.SIGUSR1)
        while time.monotonic() < until and not (found and found == os.pread(self._stack, 1 << 16, 0)):
            found = os.pread(self._stack, 1 << 16, 0)
            time.sleep(0.005)
        return found.decode(errors="replace").partition("\n")[2]

    def close(self) -> None:
        """Ends worker and fork server; safe to call twice."""
        if self._request < 0:
            return
        os.close(self._request)
        self._request = -1
        if self.worker_pid is not None:
            _kill_group(self.worker_pid)
        _kill_group(self._fork_server.pid)
        self._fork_server.wait()
        os.close(self.reply)
        os.close(self._stack)

    def _ending(self) -> str:
        try:
            status = self._fork_server.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return "a worker process closed its pipe"
        return f"a worker process ended with status {status}; its messages are on the standard error output"


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
            return
        except (ProcessLookupError, PermissionError):  # no group of its own yet, or already gone
            continue


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# What follows runs in the fork server and in the worker.


def keep() -> None:
    """The fork server's main program: loads the handler, then starts a worker whenever there is none."""
    request, reply, stack = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who then closes the pipes
    first = _read_frame(request)
    if first is None:
        return
    handler = _load(first, reply)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        print(f"the rewards' imports started {threads - 1} threads: workers start anew, not as forks", file=sys.stderr)
    ended: int | None = None
    in_a_row = 0
    while in_a_row < _QUICK_DEATHS:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            if threads > 1:
                _start_anew(first, ended)
            os._exit(_serve(request, reply, stack, handler, first[2], ended))
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _kill_group(pid)  # what the worker had started
        if ended == _CLOSED:
            return
        in_a_row = in_a_row + 1 if ended > 0 and ended != _FINISHED and time.monotonic() - began < 0.1 else 0
    raise SystemExit(f"the worker ended {_QUICK_DEATHS} times in a row with status {ended}, at once")


def _start_anew(first: tuple, ended: int | None) -> None:
    setup = os.memfd_create("setup", 0)
    os.write(setup, pickle.dumps((first, ended)))
    os.lseek(setup, 0, os.SEEK_SET)
    main = "from rewards.workers.process import work; work()"
    os.execv(sys.executable, [sys.executable, "-P", "-c", main, *sys.argv[1:], str(setup)])


def work() -> None:
    """The main program of a worker that is not a fork of the loaded handler: loads it, then answers requests."""
    request, reply, stack, setup = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(setup, "rb") as file:
        first, ended = pickle.load(file)
    os._exit(_serve(request, reply, stack, _load(first, reply), first[2], ended))


def _load(first: tuple, reply: int) -> Handler:
    try:
        target, arguments, _ = first
        module, _, factory = target.partition(":")
        return getattr(importlib.import_module(module), factory)(*arguments)
    except Exception:
        with contextlib.suppress(BrokenPipeError):
            _reply(reply, {"failed": traceback.format_exc()})
        raise SystemExit(1) from None


def _serve(request: int, reply: int, stack: int, handler: Handler, memory_bytes: int | None, ended: int | None) -> int:
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    try:
        _reply(reply, {"ready": os.getpid(), "ended": ended, "about": getattr(handler, "about", None)})
        while (message := _read_frame(request)) is not None:
            _reply(reply, {"started": True, "cpu_s": time.process_time()})
            for answer in handler(message):
                _reply(reply, answer)
                if answer.get("replace"):
                    sys.stderr.flush()
                    return _FINISHED
    except BrokenPipeError:
        return _CLOSED  # the caller has gone
    return _CLOSED


def alarm_after(seconds: float) -> None:
    """Lets the kernel kill this worker after `seconds` (0 cancels), also when the caller is gone or the GIL held."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _reply(descriptor: int, message: dict[str, Any]) -> None:
    _write_all(descriptor, b"\n" + json.dumps(message).encode() + b"\n")


def _read_frame(descriptor: int) -> Any | None:
    head = _read_exactly(descriptor, _HEAD.size)
    if head is None:
        return None
    mark, size = _HEAD.unpack(head)
    if mark != _MARK:
        return None  # a worker died in the middle of a request: give up, the caller starts a new fork server
    payload = _read_exactly(descriptor, size)
    return None if payload is None else pickle.loads(payload)


def _read_exactly(descriptor: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = os.read(descriptor, min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
