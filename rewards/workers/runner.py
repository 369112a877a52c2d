"""Scores groups of completions in worker processes that can be killed, while the next ones are still being written."""

from __future__ import annotations

import itertools
import math
import os
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.load import RewardError, RewardSpec, Row
from rewards.score import Score
from rewards.workers.process import START_TIMEOUT_S, TAKE_TIMEOUT_S, WarmProcess, WorkerGone

Scores = list[list[Score | None]]  # [rewards][samples]
CHUNK = 16  # completions a worker takes at a time: one message each way, and little to redo after a kill
STARVED_FACTOR = 4.0  # how far a deadline moves when the worker did not get a core
FIRST_FACTOR, FIRST_S = 12.0, 10.0  # how far, and at least how far, for a reward that has not answered at all yet
STOPPED_S = 30.0  # of being suspended that a worker is forgiven in one completion
MAX_TIMEOUT_SHARE = 0.5
_TICK_S = 0.25
_RESTARTS = 3
_ENOUGH, _ALL_OF = 50, 8  # scores to judge a share from; scores that may stop a run when all are errors


class RewardRunner:
    """Pre-started worker processes that score groups; every completion has its own deadline, held from outside.

    `specs` is a list of RewardSpec, addresses or config entries. `submit` hands in a group and blocks while more than
    `max_waiting` completions wait (back-pressure); `completed` returns the groups that are done. What a worker does:
    an exception, a crash twice on the same completion, or a missing column gives the verdict `error` with the traceback
    in `detail`; a deadline that passes gives `timeout`, value 0, where the answer is to blame: the reward has answered
    before, and its worker was running, neither suspended nor waiting for a core nor importing. Else, and for an async
    reward, it is an `error`. A worker is replaced after `recycle_after` completions and its private memory is capped at
    `memory_bytes`. When more than `max_error_share` of the last 200 scores are errors, or half of them deadlines that
    passed, `completed` raises RewardError with the last cause; 1.0 turns both off. Thread-safe; close it or use it in a
    `with`. The constructor raises RewardError when a reward cannot be loaded.
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
        self._recent: deque[str] = deque(maxlen=200)  # "error", "late" (a deadline held here) or ""
        self._last = {"error": "", "late": ""}
        self._first_s: dict[int, float] = {}  # reward: the longest time that a new worker needed for its first answer
        self._silent: set[int] = set()  # rewards whose long first deadline passed without an answer
        self._open = self._unscored = 0  # groups, completions
        self._failure: Exception | None = None
        self._closing = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._slots = [_Slot(self._new_process()) for _ in range(workers or os.cpu_count() or 1)]
        try:
            about = [self._await_ready(slot) for slot in self._slots][0]
            self.kinds, self.limits = [kind for kind, _ in about], [limit for _, limit in about]
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
                for slot in self._slots:
                    self._forgive_suspension(slot)
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
        next_s = max(0.0, min((min(slot.deadline - now, _TICK_S) for slot in self._slots if slot.task), default=60.0))
        handles = [self._wake_read, *(slot.process.reply for slot in self._slots)]
        poll = select.poll()  # not select(): a long run has descriptors above 1024
        for handle in handles:
            poll.register(handle, select.POLLIN)
        for handle, _ in poll.poll(next_s * 1000):
            if handle == self._wake_read:
                os.read(self._wake_read, 4096)
        passed_s = time.monotonic() - now
        if passed_s > next_s + 4 * _TICK_S:  # this thread did not run either: the machine or container stood still
            for slot in self._slots:
                slot.deadline += passed_s

    def _hand_out(self) -> None:
        for slot in self._slots:
            if slot.task is not None or slot.process.worker_pid is None:
                continue
            task = self._next_task()
            if task is None:
                return
            slot.task = task
            group = task.group
            request = (
                task.number,
                task.reward,
                [group.completions[i] for i in task.indices],
                [group.rows[i] for i in task.indices],
            )
            slot.deadline = time.monotonic() + TAKE_TIMEOUT_S
            slot.started = False
            # an async function keeps its own deadline per completion; this one is for when it blocks
            limit = self.limits[task.reward]
            slot.limit = limit if self.kinds[task.reward] != "async" else 1.2 * limit + 1
            try:
                slot.process.send(request)
            except WorkerGone as error:
                self._restart(slot, error)

    def _next_task(self) -> _Task | None:
        """The next one that needs a worker. What was late before its reward had answered needs none where the reward
        has turned out to answer at once: it gets the verdict it had."""
        while True:
            with self._changed:
                if not self._waiting:
                    return None
                task = self._waiting.popleft()
            left = [task.indices[at] for at in task.left]
            at_once = self._first_s.get(task.reward, math.inf) < self.limits[task.reward] / 2
            if not (at_once and all(index in task.deferred for index in left)):
                return task
            for index in left:
                self._store(task, index, task.deferred[index], late=task.deferred[index].verdict == "timeout")

    def _read(self, slot: _Slot) -> None:
        try:
            replies = slot.process.receive()
        except WorkerGone as error:
            self._restart(slot, error)
            return
        for reply in replies:
            task = slot.task
            if "ready" in reply:
                slot.answered = set()
                # one that died idle, before it took its work, leaves the work in the pipe for this one
                if task is not None and reply["ended"] is not None and slot.started:
                    slot.task = None
                    self._lost(task, _ending(reply["ended"]))
            elif "started" in reply:
                self._start_clock(slot, reply["cpu_s"])
            elif task is not None and reply["task"] == task.number:
                slot.failures = 0
                if task.reward not in slot.answered:
                    slot.answered.add(task.reward)
                    took_s = time.monotonic() - slot.began
                    self._first_s[task.reward] = max(took_s, self._first_s.get(task.reward, 0.0))
                score = None if reply["score"] is None else Score(**reply["score"])
                task.left.remove(reply["at"])
                self._store(task, task.indices[reply["at"]], score)
                if not task.left:
                    slot.task = None
                elif self.kinds[task.reward] == "each":
                    self._start_clock(slot, reply["cpu_s"])
                if reply.get("replace") and slot.task is not None:
                    slot.task = None
                    self._requeue(task)

    def _start_clock(self, slot: _Slot, cpu_s: float) -> None:
        """A worker begins with a completion: sets its deadline, later where its first call may have to load things."""
        task, extra_s = slot.task, 0.0
        slot.started, slot.began, slot.cpu, slot.paused_s = True, time.monotonic(), cpu_s, 0.0
        if task is None:
            return
        if task.reward in self._first_s:
            extra_s = 0.0 if task.reward in slot.answered else min(1.5 * self._first_s[task.reward], START_TIMEOUT_S)
        elif task.was_deferred():
            extra_s = max(FIRST_FACTOR * slot.limit, FIRST_S)
        slot.deadline = slot.began + slot.limit + extra_s

    def _forgive_suspension(self, slot: _Slot) -> None:
        """The deadline moves on while the worker is suspended, or waits for a disk."""
        now = time.monotonic()
        if slot.task is None or now - slot.ticked < _TICK_S:
            return
        passed_s, slot.ticked = min(now - slot.ticked, 2 * _TICK_S), now
        if slot.process.cpu_seconds()[1] in "TtD" and slot.paused_s < STOPPED_S:
            slot.paused_s += passed_s
            slot.deadline += passed_s

    def _hold_deadline(self, slot: _Slot) -> None:
        if slot.task is None or time.monotonic() < slot.deadline:
            return
        task, late_s = slot.task, time.monotonic() - slot.began
        used, state = slot.process.cpu_seconds()
        if not slot.started:
            if state == "R" and time.monotonic() - slot.deadline < START_TIMEOUT_S:
                slot.deadline += TAKE_TIMEOUT_S
            else:
                self._restart(slot, WorkerGone(f"a worker did not take its work within {TAKE_TIMEOUT_S} s"))
            return
        stack = slot.process.stack() if state not in "TtDX" else ""
        excuse, most_s = "", STARVED_FACTOR * slot.limit
        if state in "TtD":
            excuse, most_s = f"was suspended (state {state})", STOPPED_S
        elif (state == "R" and used - slot.cpu < slot.limit / 2) or slot.process.waited_s() > slot.limit / 8:
            excuse = "hardly got a core"
        elif "<frozen importlib._bootstrap>" in stack:
            excuse, most_s = "was still importing", START_TIMEOUT_S
        if excuse and late_s < most_s:
            slot.deadline = time.monotonic() + max(slot.limit / 4, _TICK_S)
            return
        slot.task = None
        slot.process.kill_worker()
        within = f"not decided within {late_s:.1f} s (timeout_s {self.limits[task.reward]:g})"
        where = f"; the function was at (innermost call first)\n{stack}" if stack else ""
        late = Score(0.0, "timeout", detail=within + where)
        if self.kinds[task.reward] == "async":
            late = Score.error(within + where)
        if excuse:
            self._lost(task, f"{excuse}: {within}{where}")
        elif task.reward in self._first_s:
            self._give_up(task, late)
        elif task.reward in self._silent or task.was_deferred():
            self._silent.add(task.reward)
            hint = "if its first call loads something, raise timeout_s or load it in the function's attribute `warm`"
            self._give_up(task, Score.error(f"{within}, and no other completion was before; {hint}{where}"))
        else:
            task.defer(late, self.kinds[task.reward] == "each")
            self._requeue(task)

    def _lost(self, task: _Task, how: str) -> None:
        """The completion that a worker was on when it ended is tried once more, then it is an error."""
        if task.attempts == 0:
            task.attempts = 1
            self._requeue(task)
        else:
            self._give_up(task, Score.error(f"{self.specs[task.reward].fn}: the worker {how}, twice"))

    def _give_up(self, task: _Task, score: Score) -> None:
        """Gives what a worker was on its verdict, and the rest of the task to the next one."""
        for at in task.left[:1] if self.kinds[task.reward] == "each" else list(task.left):
            task.left.remove(at)
            self._store(task, task.indices[at], score, late=score.verdict == "timeout")
        task.attempts = 0
        self._requeue(task)

    def _requeue(self, task: _Task) -> None:
        if task.left:
            left = [task.indices[at] for at in task.left]
            again = _Task(task.group, task.reward, left, task.attempts, task.deferred)
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
            self._lost(task, f"was lost ({error})")

    def _new_process(self) -> WarmProcess:
        return WarmProcess("rewards.workers.handler:make_handler", self._arguments, self._memory_bytes)

    def _await_ready(self, slot: _Slot) -> list[tuple[str, float]]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            for reply in slot.process.wait(left):
                if "ready" in reply:
                    return reply["about"]
        raise WorkerGone(f"a reward worker was not ready within {START_TIMEOUT_S} s")

    def _store(self, task: _Task, index: int, score: Score | None, late: bool = False) -> None:
        group = task.group
        bad = "error" if score is not None and score.verdict == "error" else "late" if late else ""
        group.scores[task.reward][index] = score
        with self._changed:
            self.counts["none" if score is None else score.verdict] += 1
            self._recent.append(bad)
            if score is not None and bad:
                self._last[bad] = f"{self.specs[task.reward].fn}: {score.detail}"
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
        seen, count = len(self._recent), Counter(self._recent)
        if self._max_error_share >= 1:
            return
        if (seen >= _ENOUGH and count["error"] > self._max_error_share * seen) or count["error"] == seen >= _ALL_OF:
            raise RewardError(
                f"{count['error']} of the last {seen} scores are errors, more than {self._max_error_share:.0%}; "
                f"fix the reward or raise max_reward_error_rate. The last one:\n{self._last['error']}"
            )
        if seen >= _ENOUGH and count["late"] > MAX_TIMEOUT_SHARE * seen:
            raise RewardError(
                f"{count['late']} of the last {seen} scores are time-outs; give the reward a longer timeout_s, or mend "
                f"what it waits for. The last one:\n{self._last['late']}"
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
    deferred: dict[int, Score] = field(default_factory=dict)  # by index: late before the reward had ever answered
    left: list[int] = field(init=False)  # into `indices`: not answered yet
    number: int = field(default_factory=itertools.count().__next__)  # tells a reply to another task

    def __post_init__(self) -> None:
        self.left = list(range(len(self.indices)))

    def was_deferred(self) -> bool:
        return self.indices[self.left[0]] in self.deferred

    def defer(self, late: Score, one: bool) -> None:
        """Puts the completion that the worker is on behind the others; without `one` it is on all of them."""
        self.deferred |= {self.indices[at]: late for at in (self.left[:1] if one else self.left)}
        self.left = self.left[1:] + self.left[:1]


@dataclass
class _Slot:
    """One worker process and what it is doing."""

    process: WarmProcess
    task: _Task | None = None
    started: bool = False
    limit: float = 0.0
    deadline: float = 0.0
    failures: int = 0
    answered: set[int] = field(default_factory=set)  # rewards that this worker has answered for
    began: float = 0.0  # with the completion it is on
    cpu: float = 0.0  # seconds it had used by then
    paused_s: float = 0.0
    ticked: float = 0.0  # when it was last looked at


def _ending(status: int) -> str:
    return f"process ended with signal {signal.Signals(-status).name}" if status < 0 else f"process ended: {status}"
