"""The trainer's weights on their way into the engines, and whose turn it is where both share a GPU."""

from __future__ import annotations

import asyncio
from typing import Any

from rlzero.cluster.actors import ClusterError, TrainerHandle
from rlzero.cluster.engines import Fleet
from rlzero.cluster.placement import Placement
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rollout.transport import nccl
from rollout.transport.base import Transport
from rollout.transport.disk import DiskTransport
from rollout.transport.ipc import IpcTransport
from rollout.transport.nccl import NcclTransport
from rollout.transport.object_store import ObjectStoreTransport
from rollout.transport.payload import engine_payload
from rollout.vllm.serving import drafts_from_policy


class Handover:
    """Every publication is whole: an engine has all of a version or is started again. `sleep_level` above 0: engines
    give up their memory while the trainer works."""

    def __init__(
        self, config: Config, kind: str, placed: Placement, trainer: TrainerHandle, fleet: Fleet, sleep_level: int
    ):
        self.trainer, self.fleet, self.placed, self.sleep_level = trainer, fleet, placed, sleep_level
        self.transport = transport(config, kind, placed.choice.transport)
        self.version = -1  # of the policy that the engines hold
        self._mtp = drafts_from_policy(config.rollout.engine_args)
        self._trainer_works = False  # its weights are about to change
        self._busy = asyncio.Lock()  # held while engines take weights
        self._restarts_known = 0  # of workers, to the transport
        if isinstance(self.transport, IpcTransport | NcclTransport):
            fleet.renew = self.renew  # a publication that engines read from the trainer itself is read once

    async def trainer_begins(self) -> None:
        """From here on the trainer's weights are those of no version."""
        async with self._busy:
            self._trainer_works = True
        if self.sleep_level:
            await self.fleet.sleep()

    async def publish(self, version: int) -> None:
        """Ends what `trainer_begins` began: the trainer's weights are those of `version`, and all engines get them."""
        async with self._busy:
            if self.sleep_level:
                await self.trainer.call("release")  # before the engines take their memory back, never after
                await self.fleet.wake()  # starts those that died asleep
            await self._hand_over(version)
            self.version, self._trainer_works = version, False

    async def renew(self) -> None:
        """Called by the fleet when a worker was started again and has no current weights. While the trainer works there
        are none; then, and in the middle of a publication, the worker gets its weights with the others."""
        if self._trainer_works or self._busy.locked():
            return
        async with self._busy:
            await self._hand_over(self.version)

    async def _hand_over(self, version: int) -> None:
        """When a worker dies meanwhile, all of them take the weights once more."""
        direct = isinstance(self.transport, IpcTransport | NcclTransport)
        several = direct and len(self.placed.ranks) > 1
        while True:
            if direct:
                await self.fleet.alive()
            if self._restarts_known != self.fleet.restarts:
                self._restarts_known = self.fleet.restarts
                await self.trainer.call("forget_transport")
            if several:
                await self._stream(version)
            else:
                handle = await self.trainer.call("publish", self.transport, version, self._mtp)
                await self.fleet.update([handle] * len(self.fleet.workers), version)
            if not self.fleet.bare:
                return

    async def _stream(self, version: int) -> None:
        """Several ranks gather their weights, a bucket at a time, while the engines receive them."""
        homes = self.placed.rank_of_worker
        engines = [homes.count(rank) for rank in range(len(self.placed.ranks))]
        handles = await self.trainer.each("offer", self.transport, version, self._mtp, engines)
        if isinstance(self.transport, NcclTransport):
            given: list[Any] = [nccl.merged(handles)] * len(self.fleet.workers)
        else:
            given = [handles[rank] for rank in homes]
        failed, _ = await asyncio.gather(self.trainer.each("send"), self.fleet.update(given, version))
        if not self.fleet.bare and (told := [text for text in failed if text is not None]):
            raise ClusterError(f"weights of version {version} did not reach every engine: {told[0]}")


def transport(config: Config, kind: str, name: str) -> Transport:
    """How weights reach the engines, by the name that the placement came to, in the form that engines of `kind` hold
    them in. Raises `UsageError` where those do not go together."""
    try:
        payload = engine_payload(config.policy.path or "", config.rollout.engine_args) if kind == "vllm" else None
    except ValueError as error:
        raise UsageError(f"rollout.engine_args: {error}") from error
    if name == "ipc":
        return IpcTransport(payload=payload)
    if name == "nccl":
        return NcclTransport(config.rollout.workers, payload=payload)
    if payload is not None:
        raise UsageError(
            f"rollout.transport: {name} sends weights as the trainer has them, and these engines hold them in FP8; use "
            "ipc (colocated) or nccl (disaggregated)"
        )
    if name == "disk":
        return DiskTransport(config.run_dir / "weights")
    return ObjectStoreTransport()
