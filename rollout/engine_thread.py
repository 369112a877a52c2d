"""An engine on a thread of its own: it writes whenever it has something to write, whether somebody waits or not.

Other calls come in between two of its steps. So an update never waits for somebody's patience with `completed`, and
the engine never waits for the next poll. Everything of the engine happens on this one thread, its start included:
threads counted per thread (OpenMP), gradient modes and the current CUDA device are what the engine set."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

from rollout.engine import Engine, Request, Rollout

T = TypeVar("T")


class EngineThread:
    """Owns the engine that `make()` returns. The constructor raises what `make` raises. Every method may be called from
    any thread; those that return a future raise, through it, what the engine raised."""

    def __init__(self, make: Callable[[], Engine]):
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[Engine], Any], Future]] = deque()
        self._open: set[str] = set()  # requests that the engine has and whose rollouts have not come out of it
        self._ended: list[Rollout] = []
        self._error: Exception | None = None  # of a step: nothing is written until another call has come in between
        self._closed = False
        started: Future = Future()
        threading.Thread(target=self._run, args=(make, started), name="engine", daemon=True).start()
        started.result()

    def call(self, work: Callable[[Engine], T]) -> Future[T]:
        """What `work(engine)` returns, done between two steps, in the order asked for."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(RuntimeError("the engine is closed and its thread has ended"))
                return future
            self._calls.append((work, future))
            self._changed.notify_all()
        return future

    def submit(self, requests: list[Request]) -> Future[None]:
        def work(engine: Engine) -> None:
            engine.submit(requests)
            self._open.update(request.id for request in requests)

        return self.call(work)

    def interrupt(self, only: Collection[str] | None = None) -> Future[list[Rollout]]:
        """See `Engine.interrupt`. Rollouts that ended before stay for `completed`."""

        def work(engine: Engine) -> list[Rollout]:
            stopped = engine.interrupt(only)
            self._open.difference_update(rollout.id for rollout in stopped)
            return stopped

        return self.call(work)

    def close(self) -> Future[None]:
        """Closes the engine and ends the thread."""

        def work(engine: Engine) -> None:
            engine.close()
            with self._changed:
                self._closed = True

        return self.call(work)

    def completed(self, timeout_s: float | None = None, gather_s: float = 0.0) -> list[Rollout]:
        """Rollouts that ended, see `Engine.completed`; once there is one, others are waited for until `gather_s` have
        passed since the call, so that few calls carry many. The engine writes on meanwhile."""
        until_s = time.monotonic() + gather_s
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._idle, timeout_s)
            if self._ended:
                self._changed.wait_for(lambda: self._idle, max(0.0, until_s - time.monotonic()))
            ended, self._ended = self._ended, []
            if not ended and self._error is not None:
                raise self._error
            return ended

    @property
    def _idle(self) -> bool:
        """Whether waiting would bring nothing more."""
        return self._closed or self._error is not None or not (self._open or self._calls)

    def _run(self, make: Callable[[], Engine], started: Future) -> None:
        try:
            engine = make()
        except BaseException as error:  # whatever it is, the constructor raises it
            started.set_exception(error)
            return
        started.set_result(None)
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or (self._open and self._error is None))
                calls, writing = list(self._calls), bool(self._open)
            for work, future in calls:
                self._answer(engine, work, future)
            if not calls and writing:
                self._step(engine)
        for work, future in list(self._calls):
            self._answer(engine, work, future)  # it says that it is closed

    def _answer(self, engine: Engine, work: Callable[[Engine], Any], future: Future) -> None:
        try:
            result, error = work(engine), None
        except BaseException as raised:  # the caller's, through the future
            result, error = None, raised
        with self._changed:
            self._calls.popleft()
            self._error = None  # it may have helped (an update, a wake): the next step shows
            self._changed.notify_all()
        future.set_result(result) if error is None else future.set_exception(error)

    def _step(self, engine: Engine) -> None:
        try:
            ended, error = engine.completed(timeout_s=0.0), None
        except Exception as raised:  # `completed` hands it on
            ended, error = [], raised
        with self._changed:
            self._ended += ended
            self._open.difference_update(rollout.id for rollout in ended)
            self._error = error
            if ended or error or not self._open:
                self._changed.notify_all()
