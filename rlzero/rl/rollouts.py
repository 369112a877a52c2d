"""Writes groups: prompts to the engines, completions to the checkers, scored groups to whoever waits; and keeps the
groups that a step leaves unfinished for the next one (partial rollouts)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rewards.workers.runner import RewardRunner
from rlzero.cluster.engines import EnginePool
from rlzero.cluster.weight_sync import WeightSync
from rlzero.rl.groups import Group
from rollout.engine import Prompt, Request, Rollout, Sampling

# A group that has been carried over this many policy versions is waited for. Its oldest tokens are no more off-policy
# than that, and no group is ever dropped: the longest completions are those that take longest to write.
MOST_CARRIED = 8


class Stopped(Exception):
    """The run was asked to end: nothing more is written; what was finished is saved."""


@dataclass(eq=False)
class OpenGroup:
    """A group that is not complete and scored yet, or not taken yet."""

    key: str
    prompt: Prompt
    size: int
    sampling: Sampling
    version: int  # of the policy when it was opened
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # the samples that ended
    partial: dict[int, Rollout] = field(default_factory=dict)  # those that were interrupted
    scored: Group | None = None
    paused: bool = False

    def requests(self) -> list[Request]:
        """What is left to write, from where it was interrupted."""
        left = [sample for sample in range(self.size) if sample not in self.rollouts]
        return [Request(self.key, s, self.prompt.tokens, self.sampling, self.partial.get(s)) for s in left]


class Writer:
    """Every group is opened once, written by one worker at a time and scored once, as soon as its last sample ends.
    `scored` is called with each. Without a `sync` engines write with the weights of their folder."""

    def __init__(
        self,
        pool: EnginePool,
        rewards: RewardRunner,
        sync: WeightSync | None = None,
        scored: Callable[[Group], None] | None = None,
    ):
        self.pool, self.rewards, self.sync = pool, rewards, sync
        self._scored = scored
        self.carried: list[OpenGroup] = []  # opened for an earlier step and not taken yet, the oldest first
        self._open: dict[str, OpenGroup] = {}
        self._unscored = 0  # groups that the checkers have
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self._tasks: dict[str, asyncio.Task] = {}

    async def all(self, tag: str, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[Group]:
        """Complete and scored groups of `samples` completions for every prompt, in the order of `prompts`. `tag` names
        the occasion (a step, an evaluation): it keys the sampling noise together with the prompt's id."""
        opened = await self._begin(tag, prompts, samples, sampling)
        await self._until(lambda: all(group.scored for group in opened))
        return [group.scored for group in opened]

    async def first(
        self, count: int, tag: str, prompts: Sequence[Prompt], samples: int, sampling: Sampling
    ) -> list[Group]:
        """The first `count` groups to be complete and scored, of the carried ones, which go on first, and new ones for
        `prompts`; in the order they were opened. The others go on being written, until `pause`, and are carried."""
        going_on = [group for group in self.carried if group.paused]
        for group in going_on:
            group.paused = False
        await self._submit(going_on)
        running = self.carried + await self._begin(tag, prompts, samples, sampling)
        overdue = [group for group in running[:count] if self._version - group.version >= MOST_CARRIED]
        await self._until(lambda: sum(bool(g.scored) for g in running) >= count and all(g.scored for g in overdue))
        taken = [group for group in running if group.scored][:count]
        self.carried = [group for group in running if group not in taken]
        return [group.scored for group in taken]

    async def pause(self) -> int:
        """Stops the writing of carried groups until the next `first`; what they have stays. Returns the tokens of the
        interrupted completions. Afterwards no engine has anything of them left."""
        stopping = {group.key: group for group in self.carried if not group.scored and not group.paused}
        ids = {request.id for group in stopping.values() for request in group.requests()}
        if not ids:
            return 0
        for group in stopping.values():
            group.paused = True
        stopped = await self.pool.interrupt(ids)
        for rollout in stopped:
            if rollout.tokens:
                stopping[rollout.prompt_id].partial[rollout.sample] = rollout
        await self._until(lambda: not self.pool.has(ids))  # those that had ended are on their way
        return sum(len(rollout.tokens) for rollout in stopped)

    def stop(self) -> None:
        """Whoever waits for groups, of a step or of an evaluation, gets `Stopped`."""
        self._failure = Stopped()
        self._news.set()

    def close(self) -> None:
        """Ends the tasks that carry rollouts and scores."""
        for task in self._tasks.values():
            task.cancel()

    @property
    def _version(self) -> int:
        """Of the policy that the engines hold."""
        return -1 if self.sync is None else self.sync.version

    # --- in between --------------------------------------------------------------------------------------------------

    async def _begin(self, tag: str, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[OpenGroup]:
        opened = [OpenGroup(f"{tag}/{p.id}", p, samples, sampling, self._version) for p in prompts]
        self._open.update((group.key, group) for group in opened)
        await self._submit(opened)
        return opened

    async def _submit(self, groups: Sequence[OpenGroup]) -> None:
        await self.pool.submit([group.requests() for group in groups])
        self._work("read", self._read)

    def _work(self, name: str, work: Callable) -> None:
        """Sees to it that `work()` runs, as a task of its own that ends when it has nothing left to do."""

        async def guarded() -> None:
            try:
                await work()
            except Exception as error:  # whoever waits for groups raises it
                self._failure = self._failure or error
            self._news.set()

        if name not in self._tasks or self._tasks[name].done():
            self._tasks[name] = asyncio.create_task(guarded())

    async def _until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()

    async def _read(self) -> None:
        """Carries rollouts from the engines to the checkers."""
        while self.pool.busy:
            if self.sync is not None:
                await self.sync.restore()
            for rollout in await self.pool.completed():
                group = self._open[rollout.prompt_id]
                group.rollouts[rollout.sample] = rollout
                group.partial.pop(rollout.sample, None)
                if len(group.rollouts) == group.size:
                    texts = [group.rollouts[s].text for s in range(group.size)]
                    self._unscored += 1
                    await asyncio.to_thread(self.rewards.submit, group.key, texts, group.prompt.row)
                    self._work("score", self._score)
            self._news.set()

    async def _score(self) -> None:
        """Carries scores from the checkers to whoever waits."""
        while self._unscored:
            for key, scores in await asyncio.to_thread(self.rewards.completed, 1.0):
                group = self._open.pop(key)
                rollouts = [group.rollouts[s] for s in range(group.size)]
                group.scored = Group(group.prompt, rollouts, [list(s) for s in zip(*scores, strict=True)])
                if self._scored is not None:
                    self._scored(group.scored)
                self._unscored -= 1
            self._news.set()
