"""The trusted side's front door: owns a fork server, hands it jobs and returns what they claim."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import values
from .exchange import START_S, Control, End, Job, SandboxError, exchange, killed_by_kernel
from .isolation import IsolationError, Limits, namespace_ids
from .names import names_of

Isolation = Literal["namespaces", "bubblewrap"]
_ENVIRONMENT = {  # nothing of ours, and strings hash alike in every run
    "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """`end` says how the job ended; `frames` are the candidate's (or the tester's) messages in order, unverified;
    `output` its standard output, `exit_code` negative for a signal, `load` why its code could not even be loaded."""

    end: End
    frames: list[dict]
    output: bytes
    exit_code: int
    cpu_s: float
    load: str | None = None


class Sandbox:
    """Runs model-written Python in isolation. Starting one takes about a second, a job a few milliseconds.

    One sandbox serves one job (or one pair of tester and candidate) at a time; use one a process. `isolation`:
    "namespaces" needs a kernel that lets an unprivileged process make them, "bubblewrap" the `bwrap` program instead.
    `preload` names further modules a candidate may import (they are imported before the file system goes away).
    Raises `SandboxError` when an isolation layer is missing; its message names it.
    """

    def __init__(
        self, limits: Limits | None = None, *, isolation: Isolation = "namespaces", preload: tuple[str, ...] = ()
    ) -> None:
        self.limits = limits or Limits()
        self.closed = True
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._jobs = 0
        self.forgiven_s = 0.0  # of waiting for a core, that no deadline counted, in all jobs so far
        self._resources = contextlib.ExitStack()
        try:
            self._start_fork_server(isolation, preload)
            self.closed = False
            hello = self._control.read(START_S)
            if hello is None:
                raise SandboxError(f"the fork server did not start within {START_S:.0f} s")
            if "missing" in hello:
                raise SandboxError(str(IsolationError(hello["missing"], hello["why"])))
            self._run([self._start({}, self.limits, expected=0, probe=True)], self.limits)
        except OSError as error:
            self.close()
            raise SandboxError(f"cannot start the sandbox: {error}") from error
        except BaseException:
            self.close()
            raise

    def _start_fork_server(self, isolation: Isolation, preload: tuple[str, ...]) -> None:
        prefix = _prefix(isolation)
        keep = self._resources
        self._devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        keep.callback(os.close, self._devnull)
        self._errors = keep.enter_context(open(os.memfd_create("errors", os.MFD_CLOEXEC), "w+b", buffering=0))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = Control(keep.enter_context(ours), self._why_dead, lambda: self._process.pid)
        with theirs, contextlib.ExitStack() as passed:
            owner = os.pidfd_open(os.getpid())
            passed.callback(os.close, owner)
            config = {
                "control": theirs.fileno(), "owner": owner, "preload": list(preload),
                "namespaces": isolation == "namespaces", "outside": namespace_ids(),
            }  # fmt: skip
            server = str(Path(__file__).with_name("fork_server.py"))
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-s", "-P", "-B", server, json.dumps(config)],
                stdin=self._devnull, stdout=self._devnull, stderr=self._errors, cwd="/", env=_ENVIRONMENT,
                pass_fds=(theirs.fileno(), owner), start_new_session=True,
            )  # fmt: skip
            keep.callback(self._end_fork_server)

    def _end_fork_server(self) -> None:
        if os.getpid() == self._owner:
            self._process.kill()
            self._process.wait()

    # -- what a checker calls ------------------------------------------------------------------------------------

    def call(
        self, code: str, entry: str, inputs: list[tuple[tuple, dict]], *, setup: str = "", limits: Limits | None = None
    ) -> Run:
        """Loads `code` (after the task's own `setup`) and calls `entry` once for each (arguments, keywords).

        Frames: {"value": tagged} or {"raised": {...}} in order; fewer than inputs when the process did not get so far.
        """
        task = {
            "mode": "call", "code": code, "setup": setup, "entry": entry,
            "calls": [values.encode(one) for one in inputs],
        }  # fmt: skip
        return self._single(task, limits or self.limits, expected=len(inputs))

    def program(self, code: str, stdin: bytes = b"", *, limits: Limits | None = None) -> Run:
        """Runs `code` as `__main__` with `stdin`; the answer is its `output` and `exit_code`."""
        source = os.memfd_create("stdin", os.MFD_CLOEXEC)
        try:
            with open(source, "wb", closefd=False) as stream:
                stream.write(stdin)
            os.lseek(source, 0, os.SEEK_SET)
            reader = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(source)
        try:
            return self._single({"mode": "program", "code": code}, limits or self.limits, expected=1, stdin=reader)
        finally:
            os.close(reader)

    def asserts(
        self,
        code: str,
        tests: list[str],
        *,
        first: int = 0,
        entries: tuple[str, ...] = (),
        setup: str = "",
        prepare: str = "",
        limits: Limits | None = None,
    ) -> Run:
        """Runs `tests[first:]` in a tester process against `code` in another one.

        `setup` is the task's own code (helpers, imports), run on both sides; `prepare` is test code to run before the
        tests; `entries` the names that belong to the candidate, by default those that only it can define.
        Frames: {"test": index, "passed": bool, "why": str} or {"test": index, "broken": str}. Raises `ValueError` for
        tests that are not Python or cannot be judged (`names_of`).
        """
        limits = limits or self.limits
        names = names_of((*tests, prepare), tuple(entries), setup)
        with self._locked():
            ours, theirs = socket.socketpair()
            with ours, theirs:
                serve = {"mode": "serve", "code": code, "setup": setup}
                test = {
                    **dataclasses.asdict(names), "tests": tests[first:], "first": first, "setup": setup,
                    "prepare": prepare, "prepare_number": len(tests), "max_bytes": limits.output_bytes,
                }  # fmt: skip
                candidate = self._start(serve, limits, expected=1, peer=ours)
                tester = self._start(test, limits, expected=len(tests) - first, peer=theirs, tester=True)
            run = self._run([tester, candidate], limits)
            if not tester.killed and len(tester.frames) < len(tests) - first:
                if not any("broken" in f or f.get("passed") is False for f in tester.frames):
                    raise SandboxError(f"the tester ended without a verdict (exit code {tester.status})")
            return dataclasses.replace(run, load=_load_error(candidate))

    def close(self) -> None:
        """Ends the fork server and everything in it."""
        self.closed = True
        self._resources.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- jobs ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if os.getpid() != self._owner:
            raise SandboxError("this sandbox was made before a fork; make one in each process")
        with self._lock:
            if self.closed:
                raise SandboxError("this sandbox is closed")
            try:
                yield
            except OSError as error:
                self.close()
                raise SandboxError(f"the sandbox failed: {error}") from error
            except BaseException:  # an interrupted exchange leaves jobs behind: they end with the fork server
                self.close()
                raise

    def _single(self, task: dict, limits: Limits, expected: int, stdin: int | None = None) -> Run:
        with self._locked():
            return self._run([self._start(task, limits, expected=expected, stdin=stdin)], limits)

    def _start(
        self,
        task: dict,
        limits: Limits,
        *,
        expected: int,
        stdin: int | None = None,
        peer: socket.socket | None = None,
        tester: bool = False,
        probe: bool = False,
    ) -> Job:
        """Asks the fork server for a process and queues its task; at most `expected` answers are read."""
        to_send = memoryview(b"" if probe else values.frame(task))
        self._jobs += 1
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe() if task.get("mode") == "program" else (None, None)
        fds = [stdin, writer, None, theirs.fileno(), *([peer.fileno()] if peer else [])]
        request = {"job": self._jobs, "limits": dataclasses.asdict(limits), "tester": tester, "probe": probe}
        try:
            self._control.write(request, [self._devnull if fd is None else fd for fd in fds])
        except BaseException:
            ours.close()
            if reader is not None:
                os.close(reader)
            raise
        finally:
            theirs.close()
            if writer is not None:
                os.close(writer)
        ours.setblocking(False)
        return Job(self._jobs, ours, reader, to_send, limits.output_bytes, expected)

    def _run(self, jobs: list[Job], limits: Limits) -> Run:
        """Feeds and reads `jobs` until the first of them has ended; the others end with it."""
        main = jobs[0]
        try:
            end = exchange(self._control, jobs, limits)
        finally:
            self.forgiven_s += self._control.forgiven_s
            for job in jobs:
                job.close()
        if any(killed_by_kernel(job, limits) for job in jobs):
            raise SandboxError("the kernel killed a job: the machine is probably out of memory")
        if end == "finished" and main.status == -signal.SIGKILL:
            end = "timeout"  # the CPU limit, which is above the time limit
        if end == "finished" and main.status < 0:
            end = "died"
        return Run(end, main.frames, bytes(main.output), main.status, main.cpu_s, _load_error(main))

    def _why_dead(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        said = self._errors.read().decode(errors="replace").strip()
        return said or f"it said nothing (exit code {self._process.poll()})"


def _load_error(job: Job) -> str | None:
    for frame in job.frames:
        if "load" in frame:
            return f"{values.text_of(frame['load'], 'type')}: {values.text_of(frame['load'], 'message')}"
    return None


def _prefix(isolation: Isolation) -> list[str]:
    """The command that the fork server runs under."""
    if isolation == "namespaces":
        return []
    if isolation != "bubblewrap":
        raise ValueError(f"isolation is {isolation!r}, expected 'namespaces' or 'bubblewrap'")
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("the bubblewrap layer is missing: no 'bwrap' program on PATH; install bubblewrap")
    return [
        program, "--unshare-all", "--unshare-user", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534",
        "--ro-bind", "/", "/", "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev", "--",
    ]  # fmt: skip
