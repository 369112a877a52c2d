"""The trusted side of one or two running jobs: feeds them, reads what they claim, keeps byte counts and deadlines."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from . import values
from .isolation import IsolationError, Limits, cpu_seconds
from .job import CANDIDATE_ENDED
from .starvation import waited_s

End = Literal["finished", "died", "timeout", "output"]
STARVED_FACTOR = 4.0  # how far a deadline moves at most, for the time that jobs waited for a core
START_S = 30.0  # for the fork server's imports, and for a job to isolate itself on an overloaded machine
_KILL_S = 10.0
_CHUNK = 1 << 18


class SandboxError(Exception):
    """The sandbox itself failed (a missing isolation layer, a dead fork server): the candidate is not to blame."""


@dataclass
class Job:
    """One process: what it is to be sent, what it said, how it ended."""

    number: int
    channel: socket.socket
    stdout: int | None
    to_send: memoryview
    max_bytes: int
    max_frames: int
    buffer: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    frames: list[dict] = field(default_factory=list)
    said_bytes: int = 0
    ready: bool = False
    ended: bool = False
    killed: bool = False
    status: int = 0
    cpu_s: float = 0.0

    def close(self) -> None:
        """Closes the parent's ends."""
        self.channel.close()
        self._close_stdout()

    def _close_stdout(self) -> None:
        if self.stdout is not None:
            os.close(self.stdout)
            self.stdout = None

    @property
    def drained(self) -> bool:
        """Whether the process has ended and all it said has been read."""
        return self.ended and self.channel.fileno() < 0 and self.stdout is None

    def send(self) -> None:
        """Sends more of the task."""
        try:
            self.to_send = self.to_send[self.channel.send(self.to_send[:_CHUNK]) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self.to_send = memoryview(b"")

    def receive(self) -> End | None:
        """Reads frames; an `End` when the process said too much ("output") or nonsense ("died")."""
        try:
            data = self.channel.recv(_CHUNK)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # it ended with part of its task unread
            data = b""
        if not data:
            self.channel.close()
            return None
        self.said_bytes += len(data)
        if self.said_bytes > self.max_bytes + 4096:
            return "output"
        self.buffer += data
        while len(self.buffer) >= 4:
            (size,) = struct.unpack_from(">I", self.buffer)
            if size > self.max_bytes:
                return "output"
            if len(self.buffer) < 4 + size:
                break
            try:
                frame = values.loads(bytes(self.buffer[4 : 4 + size]))
            except values.BadValue:
                return "died"
            del self.buffer[: 4 + size]
            if type(frame) is not dict or len(self.frames) >= self.max_frames:
                return "died"
            self._take(frame)
        return None

    def _take(self, frame: dict) -> None:
        """The first frame is the job's report before it runs anything untrusted; all others are claims."""
        if self.ready:
            self.frames.append(frame)
        elif "missing" in frame:
            raise SandboxError(str(IsolationError(str(frame["missing"]), str(frame["why"]))))
        else:
            self.ready = True

    def read_output(self) -> End | None:
        """Reads standard output; "output" when it is longer than allowed."""
        try:
            data = os.read(self.stdout, _CHUNK)
        except BlockingIOError:
            return None
        if not data:
            self._close_stdout()
        self.output += data
        return "output" if len(self.output) > self.max_bytes else None

    def note(self, message: dict) -> None:
        """Takes the fork server's report that the process ended, or never began."""
        if "refused" in message:
            raise SandboxError(f"the fork server could not start a job: {message['refused']}")
        self.ended, self.status, self.cpu_s = True, message["status"], message["cpu_s"]


class Control:
    """The line to the fork server: JSON messages, each whole. `why_dead()` describes a server that hung up; `pid()` is
    its process or one above it."""

    def __init__(self, line: socket.socket, why_dead: Callable[[], str], pid: Callable[[], int]) -> None:
        self.line = line
        self.pid = pid
        self.forgiven_s = 0.0  # by which the last exchange moved its deadlines
        self.why_dead = why_dead

    def read(self, timeout_s: float) -> dict | None:
        """The next message, or None when none came in time. `SandboxError` when the fork server is gone."""
        self.line.settimeout(timeout_s or 1e-6)
        try:
            data = self.line.recv(1 << 16)
        except TimeoutError:
            return None
        except ConnectionResetError:
            data = b""
        if not data:
            raise SandboxError(f"the fork server ended: {self.why_dead()}")
        return values.loads(data)

    def write(self, message: dict, fds: list[int] | None = None) -> None:
        """Sends a request, with descriptors where it needs some."""
        self.line.settimeout(_KILL_S)
        try:
            socket.send_fds(self.line, [values.dumps(message)], fds or [])
        except OSError as error:
            raise SandboxError(f"the fork server does not listen ({error}): {self.why_dead()}") from error


def exchange(control: Control, jobs: list[Job], limits: Limits) -> End:
    """Runs `jobs` until the first has ended or must be; all have ended when this returns.

    The clock of a test starts when every job is ready and again with every answer of the first one. It does not count
    the time that jobs waited for a core, up to `STARVED_FACTOR` times the limit.
    """
    main = jobs[0]
    deadline, last = time.monotonic() + START_S, float("inf")
    answered = -1  # answers seen; -1 until all jobs are ready
    end: End | None = None
    control.forgiven_s = 0.0
    while end is None:
        now = time.monotonic()
        if now >= min(deadline, last):
            if answered < 0:
                raise SandboxError(f"a job did not start within {START_S:.0f} s: the machine is overloaded")
            more_s = min(waited_s(control.pid()), (STARVED_FACTOR - 1) * limits.timeout_s) - control.forgiven_s
            if more_s < 0.05:
                end = "timeout"
                break
            control.forgiven_s += more_s
            deadline, last = deadline + more_s, last + more_s
        end = _step(control, jobs, min(deadline, last) - now)
        if answered < len(main.frames) and all(job.ready for job in jobs):
            last = min(last, time.monotonic() + limits.total_s)
            deadline = time.monotonic() + limits.timeout_s
            answered = len(main.frames)
        if main.drained:
            if not main.ready:
                raise SandboxError(f"a job ended before it was isolated (exit code {main.status})")
            end = end or "finished"
    _end_all(control, jobs)
    return end


def _step(control: Control, jobs: list[Job], wait_s: float) -> End | None:
    poller = select.poll()
    poller.register(control.line, select.POLLIN)
    for job in jobs:
        if job.channel.fileno() >= 0:
            poller.register(job.channel, select.POLLIN | (select.POLLOUT if job.to_send else 0))
        if job.stdout is not None:
            poller.register(job.stdout, select.POLLIN)
    ready = dict(poller.poll(max(0.0, wait_s) * 1000 + 1))
    end: End | None = None
    for job in jobs:
        events = ready.get(job.channel.fileno(), 0)
        if events & select.POLLOUT:
            job.send()
        if events & ~select.POLLOUT:
            end = end or job.receive()
        if job.stdout is not None and job.stdout in ready:
            end = end or job.read_output()
    if control.line.fileno() in ready:
        _note(jobs, control.read(0))
    return end


def _note(jobs: list[Job], message: dict | None) -> None:
    for job in jobs:
        if message is not None and message.get("job") == job.number:
            job.note(message)


def wait_for_end(control: Control, job: Job, jobs: list[Job], timeout_s: float) -> None:
    """Waits until `job` is known to have ended, at most `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not job.ended and (left := until - time.monotonic()) > 0:
        _note(jobs, control.read(left))


def _end_all(control: Control, jobs: list[Job]) -> None:
    lost = any(frame.get("why") == CANDIDATE_ENDED for frame in jobs[0].frames)
    for job in jobs:
        if lost:  # how it ended matters (out of memory is not its fault): let the report arrive before killing
            wait_for_end(control, job, jobs, 0.2)
        if not job.ended:
            job.killed = True
            control.write({"kill": job.number})
    for job in jobs:
        wait_for_end(control, job, jobs, _KILL_S)
        if not job.ended:
            raise SandboxError(f"a killed job did not end within {_KILL_S:.0f} s")


def killed_by_kernel(job: Job, limits: Limits) -> bool:
    """Whether something other than us and the CPU limit killed the job: the machine is out of memory."""
    within = job.cpu_s < cpu_seconds(limits) - 0.1
    return job.ended and not job.killed and job.status == -signal.SIGKILL and within
