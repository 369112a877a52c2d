"""The rollout workers of a run as one engine: who writes what, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import ray

from rlzero.cluster import errors as failures
from rlzero.cluster.actors import Actor, ClusterError
from rlzero.cluster.ray_cluster import Cluster
from rollout.engine import EngineUnusable, Request, Rollout

GATHER_S = 0.05  # how long a worker collects ended rollouts before it reports them; it writes on meanwhile
POLL_S = 1.0  # how long a worker waits for the first of them
IDLE_S = 0.01


class Fleet:
    """The rollout workers as one engine. The samples of a group stay on one worker: they share the prompt's cache.

    Groups wait here, in order, and go where capacity is: the next one to the worker with the fewest requests open, as
    long as it has fewer than its engine writes at once, and some to follow. So a worker that is slower than the others
    (another GPU, another load) gets fewer. A single worker gets everything at once, and batches itself. A worker that
    dies is started again with the current weights, and what it had not finished is written again.

    Sampling noise is keyed by (seed, prompt, sample, position), so who writes a group matters for nothing but the
    rounding of logits: with one worker, with the torch engine's native kernels, and where all groups find room at once,
    a repeated run has the same bits.
    """

    def __init__(self, cluster: Cluster, kind: str, folder: str, options: dict[str, Any], max_restarts: int = 10):
        self.cluster, self.kind, self.folder, self.options = cluster, kind, folder, options
        self.deadline_s = cluster.config.rollout.deadline_s
        self.workers = [cluster.worker(i, kind, folder, options) for i in range(cluster.config.rollout.workers)]
        self.open: list[dict[str, Request]] = [{} for _ in self.workers]
        self.tokens = [0 for _ in self.workers]  # written by each since the last `shares`
        self.weights: tuple[Sequence[Any], int] | None = None  # the last published (handle per worker, version)
        self.renew: Callable[[], Awaitable[None]] | None = None  # called where those handles cannot be used again
        self.bare: set[int] = set()  # workers that were started again and wait for the next publication
        self.asleep = False
        self.restarts_left = max_restarts
        self.restarts = 0
        self._room = [0 for _ in self.workers]  # requests that each may have open
        self._queue: deque[list[Request]] = deque()
        self._giving = asyncio.Lock()  # one hand gives out and takes back
        self._reviving = [asyncio.Lock() for _ in self.workers]
        self._polls: dict[asyncio.Future, tuple[int, Actor]] = {}
        self._heard_s = [time.monotonic() for _ in self.workers]

    async def ready(self) -> None:
        """Waits until every engine has loaded its weights."""
        deadline_s = self.cluster.config.cluster.deadline_s
        await asyncio.gather(*(worker.opened(deadline_s) for worker in self.workers))
        told = await asyncio.gather(*(worker.call("ping", deadline_s=self.deadline_s) for worker in self.workers))
        self._room = [room(answer["max_batch"]) for answer in told]

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether rollouts are to come."""
        return any(self.open) or bool(self._queue)

    @property
    def version(self) -> int:
        """Of the policy that the engines were last given; -1 before the first."""
        return -1 if self.weights is None else self.weights[1]

    def has(self, ids: Collection[str]) -> bool:
        """Whether rollouts of requests with these ids are to come."""
        return any(not requests.keys().isdisjoint(ids) for requests in self.open)

    async def submit(self, groups: Sequence[list[Request]]) -> None:
        """Takes groups of requests, behind those that wait already."""
        self._queue.extend(group for group in groups if group)
        await self._give_out()

    async def completed(self, timeout_s: float = 2.0) -> list[Rollout]:
        """Rollouts that ended on any worker since the last call; [] after `timeout_s` without one."""
        for index in range(len(self.workers)):
            self._poll(index)
        if not self._polls:
            await self._give_out()  # what waits may have to wait until an interruption is over
            await asyncio.sleep(IDLE_S)  # or for weights: whoever brings them has to get a turn
            return []
        ready, _ = await asyncio.wait(self._polls, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        rollouts: list[Rollout] = []
        for poll in ready:
            index, worker = self._polls.pop(poll)
            try:
                ended = poll.result()
            except ray.exceptions.RayActorError as error:
                await self._revive(index, worker, error)
                continue
            except ray.exceptions.RayTaskError as error:
                raise failures.original(error, worker.name, "completed") from error
            # An old poll may answer for a worker that was replaced meanwhile, and whose requests are written again.
            ended = [rollout for rollout in ended if self.open[index].pop(rollout.id, None) is not None]
            if ended:
                self._heard_s[index] = time.monotonic()
                self.tokens[index] += sum(len(rollout.tokens) for rollout in ended)
            self._poll(index)
            rollouts += ended
        await self._give_out()
        for worker, requests, heard_s in zip(self.workers, self.open, self._heard_s, strict=True):
            if requests and time.monotonic() - heard_s > self.deadline_s:
                raise ClusterError(
                    f"{worker.name} finished nothing for {self.deadline_s:g} s with {len(requests)} requests open and "
                    "is taken for hung; raise rollout.deadline_s if completions take that long"
                )
        return rollouts

    def shares(self) -> dict[str, float]:
        """The share that each of several workers had of the tokens written since the last call."""
        written, self.tokens = self.tokens, [0 for _ in self.workers]
        if len(written) == 1:
            return {}
        return {f"worker_share/{i}": tokens / (sum(written) or 1) for i, tokens in enumerate(written)}

    async def interrupt(self, ids: Collection[str]) -> list[Rollout]:
        """Stops the requests with these ids. Returns those that an engine had begun as rollouts with finish reason
        `interrupted`; what ended before is left to `completed`, and what waited here is forgotten."""
        async with self._giving:
            self._queue = deque(group for group in self._queue if group[0].id not in ids)
            for index in self.bare:  # they have nothing yet
                self.open[index] = {name: request for name, request in self.open[index].items() if name not in ids}
            asked = [[request for request in requests if request in ids] for requests in self.open]
            calls = (self._survive(i, "interrupt", own) for i, own in enumerate(asked) if own)
            stopped = [rollout for answer in await asyncio.gather(*calls) for rollout in answer]
            for rollout in stopped:
                for requests in self.open:
                    requests.pop(rollout.id, None)
        await self._give_out()
        return stopped

    async def _give_out(self) -> None:
        """Hands waiting groups to workers that have room for them."""
        async with self._giving:
            shares: list[list[Request]] = [[] for _ in self.workers]
            while self._queue and (ready := [i for i in range(len(self.workers)) if i not in self.bare]):
                index = min(ready, key=lambda i: len(self.open[i]))
                full = len(self.open[index]) + len(self._queue[0]) > self._room[index]
                if len(self.workers) > 1 and full and self.open[index]:
                    break
                group = self._queue.popleft()
                if not self.open[index]:
                    self._heard_s[index] = time.monotonic()
                self.open[index].update((request.id, request) for request in group)
                shares[index] += group
            await asyncio.gather(*(self._survive(i, "submit", share) for i, share in enumerate(shares) if share))

    def _poll(self, index: int) -> None:
        if self.open[index] and index not in self.bare and all(index != polled for polled, _ in self._polls.values()):
            call = self.workers[index].submit("completed", POLL_S, gather_s=GATHER_S)
            poll = asyncio.wrap_future(call.future())
            poll.add_done_callback(_heard)
            self._polls[poll] = (index, self.workers[index])

    # --- weights and life --------------------------------------------------------------------------------------------

    async def update(self, handles: Sequence[Any], version: int) -> None:
        """Installs published weights, one handle for each worker, in every engine; running requests go on with them. A
        worker that is in `bare` afterwards has died of it, and what the others say of that is not raised."""
        self.weights = (handles, version)
        waited, self.bare = self.bare, set()
        calls = (self._survive(i, "update", handle, version) for i, handle in enumerate(handles))
        errors = [e for e in await asyncio.gather(*calls, return_exceptions=True) if isinstance(e, BaseException)]
        if errors:
            if not self.bare or not all(isinstance(error, EngineUnusable) for error in errors):
                raise errors[0]
            self.bare |= waited
        for index in waited - self.bare:
            self._heard_s[index] = time.monotonic()
            if self.open[index]:
                await self._survive(index, "submit", list(self.open[index].values()))

    async def alive(self) -> None:
        """Finds workers that died unnoticed and starts them again: who waits for their engines would wait in vain."""
        await asyncio.gather(*(self._survive(i, "ping") for i in range(len(self.workers))))

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
        worker = self.workers[index]
        try:
            return await worker.call(method, *args, deadline_s=self.deadline_s)
        except ray.exceptions.RayActorError as error:
            if self.asleep:
                return None
            await self._revive(index, worker, error)
            return await self._survive(index, method, *args) if method in ("score", "interrupt") else None

    async def _revive(self, index: int, dead: Actor, error: Exception) -> None:
        """A new worker in the place of a dead one: current weights, unfinished requests from where they were given.
        Several calls may find the same worker dead; the first of them replaces it, the others wait for that."""
        renew = False
        async with self._reviving[index]:
            while self.workers[index] is dead:
                if self.restarts_left == 0:
                    raise ClusterError(
                        f"{dead.name} died again after {self.restarts} restarts ({failures.death(error)})"
                    ) from error
                self.restarts_left -= 1
                self.restarts += 1
                await self.cluster.replaced()
                worker = self.workers[index] = self.cluster.worker(index, self.kind, self.folder, self.options)
                try:
                    await worker.opened(self.cluster.config.cluster.deadline_s)
                    if self.weights is not None and self.renew is not None:
                        self.bare.add(index)
                        renew = True
                    else:
                        await self._equip(index, worker)
                except ray.exceptions.RayActorError as again:  # on a node whose death Ray had not noticed yet, say
                    dead, error = worker, again
            self._heard_s[index] = time.monotonic()
        if renew:
            await self.renew()  # gives it weights and its requests, now or with the next publication

    async def _equip(self, index: int, worker: Actor) -> None:
        """Current weights and open requests for a worker that was started again."""
        if self.weights is not None:
            handles, version = self.weights
            await worker.call("update", handles[index], version, deadline_s=self.deadline_s)
        if self.open[index]:
            await worker.call("submit", list(self.open[index].values()), deadline_s=self.deadline_s)


def room(max_batch: int) -> int:
    """Requests that a worker may have open whose engine writes `max_batch` at once: an eighth more, to follow without
    a pause where some end."""
    return max_batch + -(-max_batch // 8)


def _heard(poll: asyncio.Future) -> None:
    """Whoever asks for the poll is told what it raised; at a run's end, where workers are killed, nobody asks, and
    asyncio would complain of that."""
    if not poll.cancelled():
        poll.exception()
