"""What a worker process of the reward runner does with a request: score its completions, one reply each."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rewards import load
from rewards.load import Reward, RewardSpec, Row, load_reward
from rewards.score import Score
from rewards.workers.process import START_TIMEOUT_S, Handler, alarm_after

Request = tuple[int, int, list[str], list[Row]]  # number of the task, index of the reward, completions, a row each
# The caller's deadline comes first, also one that it moved; this one holds when the caller is gone.
ALARM_FACTOR, ALARM_EXTRA_S = 20.0, 3 * START_TIMEOUT_S
_DETAIL_CHARACTERS = 4_000


def in_worker() -> bool:
    """Whether this process is a runner's worker, which may be killed at any moment and is replaced at once."""
    return _in_worker


_in_worker = False


def make_handler(specs: tuple[RewardSpec, ...], recycle_after: int) -> Handler:
    """Loads the rewards, in the fork server, and returns the handler of requests.

    A reward function may carry an attribute `warm`, a function without arguments that imports or loads what every
    worker shall find in memory; it is called here, once. The handler's attribute `about` says per reward how its
    completions are handed out, `each`, `async` (all at once, awaited together) or `group`, and its limit in seconds.
    """
    global _in_worker
    _in_worker = True
    rewards = [load_reward(spec.fn, spec.params) for spec in specs]
    for reward in rewards:
        warm = getattr(reward.function, "warm", None)
        if callable(warm):
            warm()
    limits = [spec.timeout_s or reward.timeout_s for reward, spec in zip(rewards, specs, strict=True)]
    return _Handler(rewards, limits, recycle_after)


def _what_happened(error: BaseException) -> str:
    """The traceback from the reward's own code on: that of the caller says nothing to who wrote it."""
    ours, trace = (__file__, load.__file__, os.path.dirname(asyncio.__file__)), error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


class _Handler:
    def __init__(self, rewards: list[Reward], limits: list[float], recycle_after: int) -> None:
        self.rewards, self.left = rewards, recycle_after
        kinds = ["group" if r.is_group else "async" if r.is_async else "each" for r in rewards]
        self.about = list(zip(kinds, limits, strict=True))

    def __call__(self, request: Request) -> Iterator[dict[str, Any]]:
        task, index, completions, rows = request
        reward, (kind, limit) = self.rewards[index], self.about[index]
        alarm_s = ALARM_FACTOR * limit + ALARM_EXTRA_S
        alarm_after(alarm_s)
        if kind == "each":
            pairs = self._each(reward, completions, rows, alarm_s)
        elif kind == "async":
            pairs = iter(asyncio.run(self._together(reward, completions, rows, limit)))
        else:
            pairs = iter(enumerate(self._group(reward, completions, rows)))
        for at, score in pairs:
            self.left -= 1
            packed = None if score is None else {**asdict(score), "detail": score.detail[-_DETAIL_CHARACTERS:]}
            yield {
                "task": task,
                "at": at,
                "score": packed,
                "cpu_s": time.process_time(),
                "replace": self._worn_out(score),
            }
        alarm_after(0)

    def _each(self, reward: Reward, completions: list[str], rows: list[Row], alarm_s: float) -> Iterator[tuple]:
        for at, (completion, row) in enumerate(zip(completions, rows, strict=True)):
            alarm_after(alarm_s)
            try:
                score = reward.one(completion, row)
            except Exception as error:
                score = Score.error(_what_happened(error))
            yield at, score

    def _group(self, reward: Reward, completions: list[str], rows: list[Row]) -> list[Score | None]:
        try:
            return reward.group(completions, rows)
        except Exception as error:
            return [Score.error(_what_happened(error))] * len(completions)

    async def _together(self, reward: Reward, completions: list[str], rows: list[Row], limit: float) -> list[tuple]:
        async def one(at: int) -> tuple[int, Score | None]:
            try:
                return at, await asyncio.wait_for(reward.one_async(completions[at], rows[at]), limit)
            except TimeoutError:
                return at, Score.error(f"no answer within {limit:g} s (timeout_s); is the server there?")
            except Exception as error:
                return at, Score.error(_what_happened(error))

        return list(await asyncio.gather(*(one(at) for at in range(len(completions)))))

    def _worn_out(self, score: Score | None) -> bool:
        # After a MemoryError the process may be left with half of its allowance gone.
        exhausted = score is not None and score.verdict == "error" and "MemoryError" in score.detail
        return self.left <= 0 or exhausted
