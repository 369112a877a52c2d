"""The trainer's weights on their way into the engines, and whose turn it is where both share a GPU.

**One protocol.** `WeightSync` asks every rank of the trainer to prepare an update: names, shapes and dtypes of what it
will send, and where it is met (rollout.transport.base). The engines get that in an `update` call, and while they wait
for the tensors the ranks send them, a bucket at a time, as they gather them. In an engine every process that holds
weights (each of vLLM's workers) receives by itself. Two transports carry the bytes: `ipc` where trainer and engine
share a device, `nccl` (on CPUs gloo) elsewhere, on one host or several: each sending rank hosts a store at its Ray
node's address, where the receivers meet it.

**What is checked.** Each bucket travels with the checksums of its tensors, and every receiver compares. vLLM's workers
compare once more what they hold after the installation (rollout.vllm.install). The run ends a sync with the engines'
log-probabilities on a probe (`score`): that alone sees what an engine derived from its weights. An engine whose update
failed answers nothing until a full one succeeds.

**Who knows the version.** `WeightSync.version` is the policy that the engines hold. An engine keeps the number it was
given to label the tokens that it samples, nobody else does.

**An engine that dies.** Whoever calls it notes that in `EnginePool.dead`, and nothing else happens there. The loop that
reads rollouts starts it again and asks for its weights: `restore`. Until it has them it stands in
`EnginePool.needs_weights` and is given no requests; with them it gets those that it had left to write. While the
trainer changes the weights there is no version to give: then it gets the next one with all others. An engine that dies
while weights travel makes all of them take the weights once more.

**vLLM's own weight transfer** (`WeightTransferConfig`) is not used. It brings every update through vLLM's layerwise
reload, which takes 3 to 10 times as long as the copies here (benchmarks/RESULTS.md), compares nothing, and its calls
differ between the releases that this project supports. What it does well is done here, too: each worker receives by
itself, in packed buckets, and meets the trainer at a store.
"""

from __future__ import annotations

import asyncio

from rlzero.cluster.actors import ClusterError, TrainerHandle
from rlzero.cluster.engines import EnginePool
from rlzero.cluster.placement import Placement, engine_gpus
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rollout.transport.payload import engine_payload
from rollout.transport.transports import Transport
from rollout.vllm.serving import drafts_from_policy


class WeightSync:
    """Every sync is whole: an engine has all of a version or is started again. `sleep_level` above 0: engines give up
    their memory while the trainer works."""

    def __init__(
        self, config: Config, kind: str, placed: Placement, trainer: TrainerHandle, pool: EnginePool, sleep_level: int
    ):
        self.trainer, self.pool, self.sleep_level = trainer, pool, sleep_level
        self.transport = transport(config, kind, placed)
        self.version = -1  # of the policy that the engines hold
        self._ranks = placed.rank_of_worker  # that serve each engine
        self._mtp = drafts_from_policy(config.rollout.engine_args)
        self._trainer_works = False  # its weights are about to change
        self._busy = asyncio.Lock()  # held while weights travel
        self._restarts_known = 0  # of engines, to the trainer's senders

    async def trainer_begins(self) -> None:
        """From here on the trainer's weights are those of no version."""
        async with self._busy:
            self._trainer_works = True
        if self.sleep_level:
            await self.pool.sleep()

    async def update_engines(self, version: int) -> None:
        """Ends what `trainer_begins` began: the trainer's weights are those of `version`, and all engines get them."""
        async with self._busy:
            if self.sleep_level:
                await self.trainer.call("release")  # before the engines take their memory back, never after
                await self.pool.wake()
            await self._send(version)
            self.version, self._trainer_works = version, False

    async def restore(self) -> None:
        """Starts engines again that died, and gives them weights; those of a later version while the trainer works."""
        await self.pool.restart()
        if self.pool.needs_weights and not self._trainer_works:
            async with self._busy:
                if self.pool.needs_weights and not self._trainer_works:
                    await self._send(self.version)

    async def score(self, sequences: list[list[int]], temperature: float) -> list[list]:
        """Every engine's log-probabilities of `sequences`, one list an engine, those that die of it included."""
        while None in (answers := await self.pool.score(sequences, temperature)):
            await self.restore()
        return answers

    async def _send(self, version: int) -> None:
        """Brings the trainer's weights to all engines; to all once more where one dies meanwhile."""
        while True:
            await self.pool.find_dead()  # the sender would wait for them in vain
            await self.pool.restart()
            if self._restarts_known != self.pool.restarts:
                self._restarts_known = self.pool.restarts
                await self.trainer.call("forget_engines")
            updates = await self.trainer.each("prepare_weights", self.transport, version, self._mtp)
            given = self.transport.for_engines(updates, self._ranks)
            receiving = asyncio.create_task(self.pool.update(given))
            try:
                failed = await self.trainer.each("send_weights")
            except BaseException:  # the trainer's end explains what the engines say
                receiving.cancel()
                raise
            await receiving
            if not self.pool.dead:
                break
        if told := [text for text in failed if text is not None]:
            raise ClusterError(f"weights of version {version} did not reach every engine: {told[0]}")


def transport(config: Config, kind: str, placed: Placement) -> Transport:
    """How weights reach the engines of `kind`, in the form that these hold them in. Raises `UsageError` where a
    quantization is not sent for."""
    try:
        payload = engine_payload(config.policy.path or "", config.rollout.engine_args) if kind == "vllm" else None
    except ValueError as error:
        raise UsageError(f"rollout.engine_args: {error}") from error
    processes = engine_gpus(config) if kind == "vllm" else 1  # of each engine
    receivers = tuple(processes * placed.rank_of_worker.count(rank) for rank in range(len(placed.ranks)))
    return Transport(placed.choice.transport, receivers, payload)
