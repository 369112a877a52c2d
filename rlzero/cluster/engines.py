"""The engines of a run as one: who writes what, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import ray

from rlzero.cluster import errors as failures
from rlzero.cluster.actors import Actor, ClusterError
from rlzero.cluster.ray_cluster import Cluster
from rollout.engine import EngineUnusable, Request, Rollout
from rollout.transport.base import CorruptWeights, WeightUpdate

GATHER_S = 0.05  # how long a worker collects ended rollouts before it reports them; it writes on meanwhile
POLL_S = 1.0  # how long a worker waits for the first of them
IDLE_S = 0.01


class EnginePool:
    """The rollout workers, each an engine in a process of its own. The samples of a group stay on one worker: they
    share the prompt's cache.

    Groups wait here, in order, and go where capacity is: the next one to the worker with the fewest requests open, as
    long as it has fewer than its engine writes at once, and some to follow. So a worker that is slower than the others
    (another GPU, another load) gets fewer. A single worker gets everything at once, and batches itself. A worker that
    dies is started again, given the current weights (rlzero.cluster.weight_sync), and writes again what it had not
    finished.

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
        self.dead: dict[int, Exception] = {}  # workers whose processes are gone, and what their calls met with
        self.needs_weights: set[int] = set()  # workers that were started again, or will be, since the last `update`
        self.asleep = False
        self.restarts_left = max_restarts
        self.restarts = 0
        self._updated = False  # once; before, an engine's own folder is what it writes with
        self._capacity = [0 for _ in self.workers]  # requests that each may have open
        self._queue: deque[list[Request]] = deque()
        self._dispatching = asyncio.Lock()  # one call at a time hands requests out or takes them back
        self._restarting = asyncio.Lock()
        self._polls: dict[asyncio.Future, tuple[int, Actor]] = {}
        self._heard_s = [time.monotonic() for _ in self.workers]

    async def ready(self) -> None:
        """Waits until every engine has loaded its weights."""
        deadline_s = self.cluster.config.cluster.deadline_s
        await asyncio.gather(*(worker.opened(deadline_s) for worker in self.workers))
        told = await asyncio.gather(*(worker.call("ping", deadline_s=self.deadline_s) for worker in self.workers))
        self._capacity = [capacity(answer["max_batch"]) for answer in told]

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether rollouts are to come."""
        return any(self.open) or bool(self._queue)

    def has(self, ids: Collection[str]) -> bool:
        """Whether rollouts of requests with these ids are to come."""
        return any(not requests.keys().isdisjoint(ids) for requests in self.open)

    async def submit(self, groups: Sequence[list[Request]]) -> None:
        """Takes groups of requests, behind those that wait already."""
        self._queue.extend(group for group in groups if group)
        await self._dispatch()

    async def completed(self, timeout_s: float = 2.0) -> list[Rollout]:
        """Rollouts that ended on any worker since the last call; [] after `timeout_s` without one. Starts workers again
        that are dead."""
        await self.restart()
        for index in range(len(self.workers)):
            self._poll(index)
        if not self._polls:
            await self._dispatch()  # what waits may have to wait until an interruption is over
            await asyncio.sleep(IDLE_S)  # or for weights: whoever brings them has to get a turn
            return []
        ready, _ = await asyncio.wait(self._polls, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        rollouts: list[Rollout] = []
        for poll in ready:
            index, worker = self._polls.pop(poll)
            try:
                ended = poll.result()
            except ray.exceptions.RayActorError as error:
                self._died(index, worker, error)
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
        await self._dispatch()
        for index in self._ready():
            worker, requests = self.workers[index], self.open[index]
            if requests and time.monotonic() - self._heard_s[index] > self.deadline_s:
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
        async with self._dispatching:
            self._queue = deque(group for group in self._queue if group[0].id not in ids)
            asked = {i: [request for request in self.open[i] if request in ids] for i in self._ready()}
            calls = (self._call(i, "interrupt", own) for i, own in asked.items() if own)
            stopped = [rollout for answer in await asyncio.gather(*calls) for rollout in answer or ()]
            gone = {rollout.id for rollout in stopped}
            for index, requests in enumerate(self.open):  # workers that are not ready have begun nothing
                forgotten = gone if index in self._ready() else gone.union(ids)
                self.open[index] = {name: request for name, request in requests.items() if name not in forgotten}
        await self._dispatch()
        return stopped

    async def _dispatch(self) -> None:
        """Hands waiting groups to workers that have room for them."""
        async with self._dispatching:
            shares: list[list[Request]] = [[] for _ in self.workers]
            while self._queue and (ready := self._ready()):
                index = min(ready, key=lambda i: len(self.open[i]))
                full = len(self.open[index]) + len(self._queue[0]) > self._capacity[index]
                if len(self.workers) > 1 and full and self.open[index]:
                    break
                group = self._queue.popleft()
                if not self.open[index]:
                    self._heard_s[index] = time.monotonic()
                self.open[index].update((request.id, request) for request in group)
                shares[index] += group
            await asyncio.gather(*(self._call(i, "submit", share) for i, share in enumerate(shares) if share))

    def _poll(self, index: int) -> None:
        if self.open[index] and index in self._ready() and all(index != polled for polled, _ in self._polls.values()):
            call = self.workers[index].submit("completed", POLL_S, gather_s=GATHER_S)
            poll = asyncio.wrap_future(call.future())
            poll.add_done_callback(_heard)
            self._polls[poll] = (index, self.workers[index])

    # --- weights and life --------------------------------------------------------------------------------------------

    async def update(self, updates: Sequence[WeightUpdate]) -> None:
        """Every engine receives its update; running requests go on with it, and a worker that was started again gets
        its open ones. Where a worker is `dead` afterwards, what the others say of that is not raised."""
        self._updated = True
        calls = (self._call(i, "update", update) for i, update in enumerate(updates))
        errors = [e for e in await asyncio.gather(*calls, return_exceptions=True) if isinstance(e, BaseException)]
        if errors and not (self.dead and all(isinstance(error, EngineUnusable | CorruptWeights) for error in errors)):
            raise errors[0]
        if not errors:
            restored, self.needs_weights = self.needs_weights - self.dead.keys(), set(self.dead)
            await asyncio.gather(*(self._submit_open(index) for index in restored))

    async def find_dead(self) -> None:
        """Notes workers that died unnoticed."""
        await asyncio.gather(*(self._call(i, "ping") for i in range(len(self.workers))))

    async def restart(self) -> None:
        """Starts workers again that are dead; not while the engines sleep, because a new one would take memory that the
        trainer has. They then need weights, if engines were ever given any."""
        async with self._restarting:
            while self.dead and not self.asleep:
                await asyncio.gather(*(self._restart(index, error) for index, error in self.dead.items()))

    async def sleep(self) -> None:
        """Every engine frees its memory for the trainer."""
        self.asleep = True
        await asyncio.gather(*(self._call(i, "sleep") for i in range(len(self.workers))))

    async def wake(self) -> None:
        """Undoes `sleep`; an `update` has to follow."""
        self.asleep = False
        await asyncio.gather(*(self._call(i, "wake") for i in range(len(self.workers))))

    async def memory(self) -> list[dict[str, int]]:
        """What every engine holds of its GPU, see `trainer.device_memory`; {} of one that is dead."""
        answers = await asyncio.gather(*(self._call(i, "memory") for i in range(len(self.workers))))
        return [answer or {} for answer in answers]

    async def score(self, sequences: list[list[int]], temperature: float) -> list[list | None]:
        """Every engine's log-probabilities of `sequences`, one list an engine; None of one that is dead or needs
        weights."""
        calls = {i: self._call(i, "score", sequences, temperature) for i in self._ready()}
        answers = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
        return [answers.get(i) for i in range(len(self.workers))]

    def _ready(self) -> list[int]:
        """Workers that can be given requests."""
        return [i for i in range(len(self.workers)) if i not in self.dead and i not in self.needs_weights]

    async def _call(self, index: int, method: str, *args: Any) -> Any:
        """What the worker answers; None where it is dead."""
        if index in self.dead:
            return None
        worker = self.workers[index]
        try:
            return await worker.call(method, *args, deadline_s=self.deadline_s)
        except ray.exceptions.RayActorError as error:
            self._died(index, worker, error)
            return None

    def _died(self, index: int, worker: Actor, error: Exception) -> None:
        """Several calls may find the same worker dead, some after it was replaced."""
        if self.workers[index] is worker:
            self.dead[index] = error
            if self._updated:
                self.needs_weights.add(index)

    async def _restart(self, index: int, error: Exception) -> None:
        """A new worker in the place of a dead one."""
        if self.restarts_left == 0:
            raise ClusterError(
                f"{self.workers[index].name} died again after {self.restarts} restarts ({failures.death(error)})"
            ) from error
        self.restarts_left -= 1
        self.restarts += 1
        await self.cluster.replaced()
        worker = self.workers[index] = self.cluster.worker(index, self.kind, self.folder, self.options)
        try:
            await worker.opened(self.cluster.config.cluster.deadline_s)
        except ray.exceptions.RayActorError as again:  # on a node whose death Ray had not noticed yet, say
            self.dead[index] = again
            return
        del self.dead[index]
        if index not in self.needs_weights:
            await self._submit_open(index)

    async def _submit_open(self, index: int) -> None:
        """To a worker that was started again and is ready: what the old one had not finished."""
        self._heard_s[index] = time.monotonic()
        if self.open[index]:
            await self._call(index, "submit", list(self.open[index].values()))


def capacity(max_batch: int) -> int:
    """Requests that a worker may have open whose engine writes `max_batch` at once: an eighth more, to follow without
    a pause where some end."""
    return max_batch + -(-max_batch // 8)


def _heard(poll: asyncio.Future) -> None:
    """Whoever asks for the poll is told what it raised; at a run's end, where workers are killed, nobody asks, and
    asyncio would complain of that."""
    if not poll.cancelled():
        poll.exception()
