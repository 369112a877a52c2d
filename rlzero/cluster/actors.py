"""The processes of a run as Ray actors: calls with deadlines, the ranks of the trainer as one, and how the death of one
or an error in it is told."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any

import ray
import torch

from rlzero.cluster import errors as failures
from rlzero.config.read import UsageError
from rollout.transport.base import Sender, WeightUpdate
from rollout.transport.transports import Transport
from trainer.parallel.ranks import Rendezvous
from trainer.trainer import Trainer

SHOWN = 12  # lines of an error of a start
DEATH_S = 10.0  # how long Ray gets to report a rank's death that another rank has met with


class ClusterError(RuntimeError):
    """The cluster cannot hold the run, or an actor of it failed for good."""


class TrainerDied(ClusterError):
    """The trainer's process is gone; the run goes on from its last checkpoint."""


class Actor:
    """A Ray actor with a name for people. Every call has a deadline."""

    def __init__(self, handle: Any, name: str):
        self.handle, self.name = handle, name

    def submit(self, method: str, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        return getattr(self.handle, method).remote(*args, **kwargs)

    async def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """What `method` returns. Raises `ClusterError` when it takes longer than `deadline_s`, Ray's `RayActorError`
        when the process is gone."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self.submit(method, *args, **kwargs)
        except TimeoutError as error:
            raise ClusterError(
                f"{self.name} did not answer '{method}' within {deadline_s:g} s and is taken for hung; if the work "
                "really takes that long, raise rollout.deadline_s (cluster.deadline_s for the start)"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise failures.original(error, self.name, method) from error

    async def opened(self, deadline_s: float, method: str = "opened", *args: Any, **kwargs: Any) -> None:
        """Waits until the process has made what it owns. Raises `UsageError` where what it was given cannot be used."""
        try:
            await self.call(method, *args, deadline_s=deadline_s, **kwargs)
        except (FileNotFoundError, ValueError) as error:
            lines = str(error).splitlines()
            shown = lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  ... and {len(lines) - SHOWN} more lines"]
            raise UsageError(f"{self.name} cannot start: " + "\n".join(shown)) from error

    def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)


class TrainerActor(Trainer):
    """One rank of the trainer as a Ray actor. The process is there first and `open` makes the trainer in it, because
    the ranks have to be told where rank 0 listens."""

    def __init__(self, rank: int):
        self._rank, self._listener = rank, None
        self._sender: Sender | None = None

    def meet(self) -> str:
        """Rank 0's address, host:port, at which the others find it: of the node's own interface, nobody else's."""
        self._listener = socket.socket()
        self._listener.bind((ray.util.get_node_ip_address(), 0))
        self._listener.listen()
        return "{}:{}".format(*self._listener.getsockname())

    def open(self, *args: Any, address: str | None = None, **kwargs: Any) -> None:
        """Loads the policy. With an `address` this is one of several ranks, whose `open` has to be called as well."""
        rendezvous = None
        if address is not None:
            if address.startswith("127."):  # a cluster of this machine alone listens on loopback only
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            listening = self._listener.detach() if self._listener is not None else None
            rendezvous = Rendezvous(self._rank, address, listening)
        super().__init__(*args, rendezvous=rendezvous, **kwargs)

    def prepare_weights(self, transport: Transport, version: int, mtp: bool) -> WeightUpdate:
        """What `send_weights` will bring of the policy of this version, see `Sender`. `mtp`: its layers of multi-token
        prediction, too, for engines that draft with them."""
        if self._sender is None:
            self._sender = transport.sender(self._rank, self.device, ray.util.get_node_ip_address())
        owned = transport.kind == "nccl"
        self._weights = lambda: (self.policy.owned_weights if owned else self.policy.weights)(mtp)
        return self._sender.prepare(self.policy.layout(mtp), version, self.policy.owners(mtp) if owned else None)

    def send_weights(self) -> str | None:
        """Brings what was prepared. Returns, and does not raise, what went wrong at an engine: this rank is well."""
        try:
            self._sender.send(self._weights())
        except RuntimeError as error:
            return str(error)
        return None

    def forget_engines(self) -> None:
        """The next update begins with a new sender: of the engines that an old one knew, one is gone."""
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def release(self) -> None:
        """Gives back the device memory that nothing holds at the moment."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pid(self) -> int:
        return os.getpid()


class TrainerHandle:
    """Calls on all ranks of the trainer, each with the same arguments: their methods are collectives. The death of a
    rank becomes `TrainerDied`. What one rank raises arrives as it is and without waiting for the others, which are left
    in the middle of a collective: they are killed."""

    def __init__(self, ranks: list[Actor], deadline_s: float, args: tuple, kwargs: dict[str, Any]):
        self.ranks, self.deadline_s = ranks, deadline_s
        self._made_of, self._is_open = (args, kwargs), False

    async def ready(self, deadline_s: float) -> None:
        """Waits until every rank has loaded its part of the policy; they begin when this is called first."""
        if self._is_open:
            return
        args, kwargs = self._made_of
        if len(self.ranks) > 1:
            address = (await self._together("meet", [self.ranks[0].call("meet", deadline_s=deadline_s)]))[0]
            kwargs = {**kwargs, "address": address}
        await self._together("open", [rank.opened(deadline_s, "open", *args, **kwargs) for rank in self.ranks])
        self._is_open = True

    async def call(self, method: str, *args: Any, deadline_s: float | None = None, **kwargs: Any) -> Any:
        """What rank 0 returns, once every rank has returned."""
        return (await self.each(method, *args, deadline_s=deadline_s, **kwargs))[0]

    async def each(self, method: str, *args: Any, deadline_s: float | None = None, **kwargs: Any) -> list[Any]:
        """What every rank returns."""
        if len(self.ranks) > 1:  # what is large is stored once, and read there by every rank
            args = tuple(arg if isinstance(arg, str | int | float | None) else ray.put(arg) for arg in args)
        limit_s = deadline_s or self.deadline_s
        calls = [rank.call(method, *args, deadline_s=limit_s, **kwargs) for rank in self.ranks]
        return await self._together(method, calls)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    async def _together(self, method: str, calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        tasks = [asyncio.create_task(call) for call in calls]
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if not (raised := _raised(tasks)):
                return [task.result() for task in tasks]
            # A rank that lost another one may say so before Ray does.
            until_s = time.monotonic() + DEATH_S
            while waiting and all(map(_lost_a_peer, raised)) and (left_s := until_s - time.monotonic()) > 0:
                _, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                raised = _raised(tasks)
            if len(self.ranks) > 1:
                self.kill()
            raise self._told(method, tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _told(self, method: str, tasks: list[asyncio.Task]) -> Exception:
        """The error that explains the others: a death, then what is not about a lost rank, then whatever there is."""
        for rank, task in zip(self.ranks, tasks, strict=False):
            error = task.exception() if task.done() else None
            if isinstance(error, ray.exceptions.RayActorError):
                return TrainerDied(f"the {rank.name}'s process died during '{method}' ({failures.death(error)})")
        raised = _raised(tasks)
        return next((error for error in raised if not _lost_a_peer(error)), raised[0])


def _raised(tasks: list[asyncio.Task]) -> list[Exception]:
    return [error for task in tasks if task.done() and (error := task.exception()) is not None]


def _lost_a_peer(error: Exception) -> bool:
    """Whether this is what a collective raises in a rank when another one is gone."""
    text = str(error)
    about = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and not isinstance(error, ClusterError) and any(word in text for word in about)
    )
