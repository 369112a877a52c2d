"""The rollout workers of a run as one engine: who writes what, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray

from rlzero import failures
from rlzero.actors import ClusterError
from rlzero.cluster import Cluster
from rollout.engine import EngineUnusable, Request, Rollout

GATHER_S = 0.25  # how long a worker collects ended rollouts before it reports them


class Fleet:
    """The rollout workers as one engine. The samples of a group stay on one worker (they share the prompt's cache);
    groups go to workers in turn, so the same requests meet the same batches again in a repeated run. A worker that
    dies is started again with the current weights, and what it had not finished is written again."""

    def __init__(self, cluster: Cluster, kind: str, folder: str, options: dict[str, Any], max_restarts: int = 10):
        self.cluster, self.kind, self.folder, self.options = cluster, kind, folder, options
        self.deadline_s = cluster.config.rollout.deadline_s
        self.workers = [cluster.worker(i, kind, folder, options) for i in range(cluster.config.rollout.workers)]
        self.open: list[dict[str, Request]] = [{} for _ in self.workers]
        self.weights: tuple[list[Any], int] | None = None  # the last published: a handle for each worker, version
        self.renew: Callable[[], Awaitable[None]] | None = None  # called where those handles cannot be used again
        self.bare: set[int] = set()  # workers that were started again and wait for the next publication
        self.asleep = False
        self.restarts_left = max_restarts
        self.restarts = 0
        self._polls: dict[asyncio.Future, int] = {}
        self._heard_s = [time.monotonic() for _ in self.workers]

    async def ready(self) -> None:
        """Waits until every engine has loaded its weights."""
        deadline_s = self.cluster.config.cluster.deadline_s
        await asyncio.gather(*(worker.opened(deadline_s) for worker in self.workers))

    async def submit(self, groups: Sequence[list[Request]]) -> None:
        """Gives out groups of requests, the first to the first worker and so on in turn."""
        for index in range(len(self.workers)):
            share = [request for group in groups[index :: len(self.workers)] for request in group]
            if share:
                self.open[index].update((r.id, r) for r in share)
                self._heard_s[index] = time.monotonic()
                if index not in self.bare:
                    await self._survive(index, "submit", share)

    async def completed(self, timeout_s: float = 2.0) -> list[Rollout]:
        """Rollouts that ended on any worker since the last call; [] after `timeout_s` without one."""
        for index in range(len(self.workers)):
            self._poll(index)
        if not self._polls:
            return []
        ready, _ = await asyncio.wait(self._polls, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        rollouts: list[Rollout] = []
        for poll in ready:
            index = self._polls.pop(poll)
            try:
                ended = poll.result()
            except ray.exceptions.RayActorError as error:
                await self._revive(index, error)
                continue
            except ray.exceptions.RayTaskError as error:
                raise failures.original(error, self.workers[index].name, "completed") from error
            for rollout in ended:
                self.open[index].pop(rollout.id, None)
            if ended:
                self._heard_s[index] = time.monotonic()
            self._poll(index)  # at once: the engine only works inside a call
            rollouts += ended
        for worker, requests, heard_s in zip(self.workers, self.open, self._heard_s, strict=True):
            if requests and time.monotonic() - heard_s > self.deadline_s:
                raise ClusterError(
                    f"{worker.name} finished nothing for {self.deadline_s:g} s with {len(requests)} requests open and "
                    "is taken for hung; raise rollout.deadline_s if completions take that long"
                )
        return rollouts

    def _poll(self, index: int) -> None:
        if self.open[index] and index not in self.bare and index not in self._polls.values():
            call = self.workers[index].submit("completed", 1.0, gather_s=GATHER_S)
            self._polls[asyncio.wrap_future(call.future())] = index

    async def update(self, handles: list[Any], version: int) -> None:
        """Installs published weights in every engine, running requests included; `handles` has one for each worker. A
        worker that is in `bare` afterwards has died of it, and what the others say of that is not raised."""
        self.weights = (handles, version)
        waited, self.bare = self.bare, set()
        calls = (self._survive(i, "update", handles[i], version) for i in range(len(self.workers)))
        errors = [e for e in await asyncio.gather(*calls, return_exceptions=True) if isinstance(e, BaseException)]
        if errors:
            if not self.bare or not all(isinstance(error, EngineUnusable) for error in errors):
                raise errors[0]
            self.bare |= waited
        for index in waited - self.bare:
            self._heard_s[index] = time.monotonic()
            if self.open[index]:
                await self._survive(index, "submit", list(self.open[index].values()))

    async def sleep(self) -> None:
        """Every engine frees its memory for the trainer. One that dies from here on is not started before `wake`: it
        would take memory that the trainer has."""
        self.asleep = True
        await asyncio.gather(*(self._survive(i, "sleep") for i in range(len(self.workers))))

    async def wake(self) -> None:
        """Undoes `sleep`; an `update` has to follow."""
        self.asleep = False
        await asyncio.gather(*(self._survive(i, "wake") for i in range(len(self.workers))))

    async def memory(self) -> list[dict[str, int]]:
        """What every engine holds of its GPU, see `trainer.device_memory`; {} of one that died meanwhile."""
        answers = await asyncio.gather(*(self._survive(i, "memory") for i in range(len(self.workers))))
        return [answer or {} for answer in answers]

    async def score(self, sequences: list[list[int]], temperature: float) -> list[list]:
        """Every engine's log-probabilities of `sequences`, one list a worker."""
        calls = (self._survive(i, "score", sequences, temperature) for i in range(len(self.workers)))
        return await asyncio.gather(*calls)

    async def _survive(self, index: int, method: str, *args: Any) -> Any:
        """One call that outlives the worker: a restarted one has the current weights and its open requests."""
        try:
            return await self.workers[index].call(method, *args, deadline_s=self.deadline_s)
        except ray.exceptions.RayActorError as error:
            if self.asleep:
                return None
            await self._revive(index, error)
            return await self._survive(index, method, *args) if method == "score" else None

    async def _revive(self, index: int, error: Exception) -> None:
        """A new worker in the place of a dead one: current weights, unfinished requests from their start."""
        if self.restarts_left == 0:
            name = self.workers[index].name
            raise ClusterError(f"{name} died again after {self.restarts} restarts ({failures.death(error)})") from error
        self.restarts_left -= 1
        self.restarts += 1
        await self.cluster.replaced()
        worker = self.workers[index] = self.cluster.worker(index, self.kind, self.folder, self.options)
        try:
            await worker.opened(self.cluster.config.cluster.deadline_s)
            if self.weights is not None and self.renew is not None:
                self.bare.add(index)
                await self.renew()  # gives it weights and its requests, now or with the next publication
            elif self.weights is not None:
                handles, version = self.weights
                await worker.call("update", handles[index], version, deadline_s=self.deadline_s)
            if self.open[index] and self.renew is None:
                await worker.call("submit", list(self.open[index].values()), deadline_s=self.deadline_s)
        except ray.exceptions.RayActorError as again:  # placed on a node whose death Ray had not noticed yet, say
            await self._revive(index, again)
        self._heard_s[index] = time.monotonic()
