"""Scores groups of completions in worker processes that can be killed, while the next ones are still being written."""

from __future__ import annotations

import itertools
import math
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.load import RewardError, RewardSpec, Row
from rewards.score import Score
from rewards.workers.process import START_TIMEOUT_S, TAKE_TIMEOUT_S, WarmProcess, WorkerGone

Scores = list[list[Score | None]]  # [rewards][samples]
CHUNK = 16  # completions a worker takes at a time: one message each way, and little to redo after a kill
STARVED_FACTOR = 4.0  # how far a deadline moves when the worker did not get a core
_RESTARTS = 3


class RewardRunner:
    """Pre-started worker processes that score groups; every completion has its own deadline, held from outside.

    `specs` is a list of RewardSpec, addresses or config entries. `submit` hands in a group and blocks while more than
    `max_waiting` completions wait (back-pressure); `completed` returns the groups that are done. What a worker does:
    an exception, a crash twice on the same completion, or a missing column gives the verdict `error` with the traceback
    in `detail`; a deadline that passes gives `timeout`, value 0. A worker is replaced after `recycle_after` completions
    and its private memory is capped at `memory_bytes`. When more than `max_error_share` of the last 200 scores are
    errors, `completed` raises RewardError with the last traceback. Thread-safe; close it or use it in a `with`.
    The constructor raises RewardError when a reward cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec | str | Mapping[str, Any] | Any],
        workers: int | None = None,
        *,
        memory_bytes: int | None = 4 << 30,
        recycle_after: int = 5_000,
        max_waiting: int = 4_096,
        max_error_share: float = 0.1,
    ) -> None:
        self.specs = [RewardSpec.of(spec) for spec in specs]
        if not self.specs:
            raise RewardError("no rewards given; a run needs at least one")
        self.counts = dict.fromkeys(("correct", "wrong", "unparsed", "timeout", "error", "none"), 0)
        self._arguments = (tuple(self.specs), recycle_after)
        self._memory_bytes, self._max_waiting, self._max_error_share = memory_bytes, max_waiting, max_error_share
        self._changed = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._done: deque[tuple[Any, Scores]] = deque()
        self._recent: deque[bool] = deque(maxlen=200)
        self._last_error = ""
        self._open = self._unscored = 0  # groups, completions
        self._failure: Exception | None = None
        self._closing = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._slots = [_Slot(self._new_process()) for _ in range(workers or os.cpu_count() or 1)]
        try:
            self.kinds = [self._await_ready(slot) for slot in self._slots][0]
        except WorkerGone as error:
            for slot in self._slots:
                slot.process.close()
            raise RewardError(str(error)) from None
        self._thread = threading.Thread(target=self._run, name="reward-runner", daemon=True)
        self._thread.start()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: Any, completions: Sequence[str], rows: Row | Sequence[Row]) -> None:
        """Hands in a group under `key`, with the row of its prompt (or a row per completion)."""
        each = [rows] * len(completions) if isinstance(rows, Mapping) else list(rows)
        if len(each) != len(completions):
            raise RewardError(f"group {key!r}: {len(completions)} completions but {len(each)} rows")
        group = _Group(key, list(completions), each, [[None] * len(completions) for _ in self.specs])
        indices = list(range(len(completions)))
        size = max(1, min(CHUNK, math.ceil(len(completions) / len(self._slots))))
        with self._changed:
            self._changed.wait_for(lambda: self._unscored < self._max_waiting or self._failure or self._closing)
            self._check()
            self._open += 1
            group.left = len(self.specs) * len(completions)
            self._unscored += group.left
            if not indices:
                self._finish(group)
            for reward, kind in enumerate(self.kinds):
                step = size if kind == "each" else len(indices)
                for start in range(0, len(indices), step or 1):
                    self._waiting.append(_Task(group, reward, indices[start : start + step]))
        self._wake()

    def completed(self, timeout_s: float | None = None) -> list[tuple[Any, Scores]]:
        """The groups that are done: (key, scores `[rewards][samples]`), each exactly once, in the order they ended.

        Waits up to `timeout_s` (None: without end) for the first one; an empty list when there is none or nothing is
        open. Raises RewardError when too many scores are errors or the workers cannot be kept running.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done or not self._open or self._failure or self._closing, timeout_s)
            self._check()
            ready = list(self._done)
            self._done.clear()
            self._open -= len(ready)
            return ready

    def score(self, completions: Sequence[str], rows: Row | Sequence[Row]) -> Scores:
        """The scores `[rewards][samples]` of one group, waited for. Not to be mixed with open submits."""
        key = object()
        self.submit(key, completions, rows)
        (found,) = self.completed()
        assert found[0] is key, "score() while other groups are open: use submit() and completed()"
        return found[1]

    def close(self) -> None:
        """Ends the workers; open groups are dropped. Safe to call twice."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # The thread that owns the processes.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._hand_out()
                self._await_events()
                for slot in self._slots:
                    self._read(slot)
                    self._hold_deadline(slot)
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for slot in self._slots:
                slot.process.close()

    def _await_events(self) -> None:
        now = time.monotonic()
        next_s = min((slot.deadline - now for slot in self._slots if slot.task), default=60.0)
        handles = [self._wake_read, *(slot.process.reply for slot in self._slots)]
        poll = select.poll()  # not select(): a long run has descriptors above 1024
        for handle in handles:
            poll.register(handle, select.POLLIN)
        for handle, _ in poll.poll(max(0.0, min(next_s, 60.0)) * 1000):
            if handle == self._wake_read:
                os.read(self._wake_read, 4096)

    def _hand_out(self) -> None:
        for slot in self._slots:
            if slot.task is not None or slot.process.worker_pid is None:
                continue
            with self._changed:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            slot.task = task
            group, spec = task.group, self.specs[task.reward]
            request = (
                task.number,
                task.reward,
                [group.completions[i] for i in task.indices],
                [group.rows[i] for i in task.indices],
            )
            slot.deadline = time.monotonic() + TAKE_TIMEOUT_S
            slot.started = False
            # an async function keeps its own deadline per completion; this one is for when it blocks
            slot.limit = spec.timeout_s if self.kinds[task.reward] != "async" else 1.2 * spec.timeout_s + 1
            try:
                slot.process.send(request)
            except WorkerGone as error:
                self._restart(slot, error)

    def _read(self, slot: _Slot) -> None:
        try:
            replies = slot.process.receive()
        except WorkerGone as error:
            self._restart(slot, error)
            return
        for reply in replies:
            task = slot.task
            if "ready" in reply:
                # one that died idle, before it took its work, leaves the work in the pipe for this one
                if task is not None and reply["ended"] is not None and slot.started:
                    slot.task = None
                    self._lost(task, reply["ended"])
            elif "started" in reply:
                slot.start_clock(reply["cpu_s"])
            elif task is not None and reply["task"] == task.number:
                slot.failures = 0
                score = None if reply["score"] is None else Score(**reply["score"])
                task.left.remove(reply["at"])
                self._store(task, task.indices[reply["at"]], score)
                if not task.left:
                    slot.task = None
                elif self.kinds[task.reward] == "each":
                    slot.start_clock(reply["cpu_s"])
                if reply.get("replace") and slot.task is not None:
                    slot.task = None
                    self._requeue(task)

    def _hold_deadline(self, slot: _Slot) -> None:
        if slot.task is None or time.monotonic() < slot.deadline:
            return
        if slot.starved():
            slot.deadline = time.monotonic() + slot.limit / 4
            return
        if not slot.started:
            self._restart(slot, WorkerGone(f"a worker did not take its work within {TAKE_TIMEOUT_S} s"))
            return
        task, slot.task = slot.task, None
        slot.process.kill_worker()
        self._lost(task, -signal.SIGALRM)

    def _lost(self, task: _Task, ended: int) -> None:
        """Gives the completion that a worker was on when it ended its verdict, and the rest another worker."""
        blamed = task.left[:1] if self.kinds[task.reward] == "each" else list(task.left)
        limit = self.specs[task.reward].timeout_s
        if -ended in (signal.SIGALRM, signal.SIGPROF):
            score = Score(0.0, "timeout", detail=f"not decided within its limit ({limit} s at most)")
        elif task.attempts == 0:
            task.attempts = 1
            self._requeue(task)
            return
        else:
            how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"status {ended}"
            score = Score.error(f"{self.specs[task.reward].fn}: the worker process ended with {how}, twice")
        for at in blamed:
            task.left.remove(at)
            self._store(task, task.indices[at], score)
        task.attempts = 0
        self._requeue(task)

    def _requeue(self, task: _Task) -> None:
        if task.left:
            again = _Task(task.group, task.reward, [task.indices[at] for at in task.left], task.attempts)
            with self._changed:
                self._waiting.appendleft(again)

    def _restart(self, slot: _Slot, error: WorkerGone) -> None:
        task, slot.task = slot.task, None
        slot.failures += 1
        slot.process.close()
        if slot.failures > _RESTARTS:
            raise RewardError(f"the reward workers do not stay up: {error}") from error
        slot.process = self._new_process()
        if task is not None:
            self._lost(task, 1)

    def _new_process(self) -> WarmProcess:
        return WarmProcess("rewards.workers.handler:make_handler", self._arguments, self._memory_bytes)

    def _await_ready(self, slot: _Slot) -> list[str]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            for reply in slot.process.wait(left):
                if "ready" in reply:
                    return reply["about"]
        raise WorkerGone(f"a reward worker was not ready within {START_TIMEOUT_S} s")

    def _store(self, task: _Task, index: int, score: Score | None) -> None:
        group = task.group
        group.scores[task.reward][index] = score
        with self._changed:
            self.counts["none" if score is None else score.verdict] += 1
            self._recent.append(score is not None and score.verdict == "error")
            if score is not None and score.verdict == "error":
                self._last_error = score.detail
            self._unscored -= 1
            group.left -= 1
            if group.left == 0:
                self._finish(group)
            self._changed.notify_all()

    def _finish(self, group: _Group) -> None:
        self._done.append((group.key, group.scores))
        self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise RewardError(f"the reward runner stopped: {self._failure}") from self._failure
        if self._closing:
            raise RewardError("the reward runner is closed")
        errors = sum(self._recent)
        if len(self._recent) >= 50 and errors > self._max_error_share * len(self._recent):
            raise RewardError(
                f"{errors} of the last {len(self._recent)} scores are errors, more than {self._max_error_share:.0%}; "
                f"fix the reward or raise max_error_share. The last one:\n{self._last_error}"
            )

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            return  # full: it will wake up anyway


@dataclass
class _Group:
    key: Any
    completions: list[str]
    rows: list[Row]
    scores: Scores
    left: int = 0


@dataclass
class _Task:
    group: _Group
    reward: int
    indices: list[int]  # into the group
    attempts: int = 0
    left: list[int] = field(init=False)  # into `indices`: not answered yet
    number: int = field(default_factory=itertools.count().__next__)  # tells a reply to another task

    def __post_init__(self) -> None:
        self.left = list(range(len(self.indices)))


@dataclass
class _Slot:
    """A place at the table: one process and what it is doing."""

    process: WarmProcess
    task: _Task | None = None
    started: bool = False
    limit: float = 0.0
    deadline: float = 0.0
    failures: int = 0
    _wall: float = 0.0
    _cpu: float = 0.0

    def start_clock(self, cpu_s: float) -> None:
        self.started, self._wall, self._cpu = True, time.monotonic(), cpu_s
        self.deadline = self._wall + self.limit

    def starved(self) -> bool:
        """Whether the deadline passed because the worker waited for a core: runnable, and hardly any CPU used."""
        used, state = self.process.cpu_seconds()
        if not self.started:
            return state == "R" and time.monotonic() - self.deadline < START_TIMEOUT_S
        late = time.monotonic() - self._wall > STARVED_FACTOR * self.limit
        return state == "R" and used - self._cpu < self.limit / 2 and not late
