"""Ray: what a run needs of a cluster, its actors, their deadlines, and what happens when one dies.

Nothing else in the project calls Ray's placement or supervision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlzero import failures
from rlzero.config import Config
from rlzero.placement import Placement, Process, plan, resources
from rlzero.reading import UsageError
from rollout.transport.ipc import IpcTransport
from rollout.transport.nccl import NcclTransport
from rollout.worker import RolloutWorker
from trainer.parallel import Rendezvous
from trainer.worker import Trainer

SHOWN = 12  # lines of an error of a start
DEATH_S = 10.0  # how long Ray gets to report a rank's death that another rank has met with
REPLACE_S = 20.0  # how long Ray gets to find another node for what ran on a dead one


class ClusterError(RuntimeError):
    """The cluster cannot hold the run, or an actor of it failed for good."""


class TrainerDied(ClusterError):
    """The trainer's process is gone; the run goes on from its last checkpoint."""


def connect(address: str | None, cpus: int | None = None) -> None:
    """Joins the cluster at `address` (`auto`: the one running here), or starts one on this machine that listens on
    loopback only and offers `cpus` (none: as many as there are). Ray counts CPUs for placement only: how many threads
    each process takes is set by `plan`."""
    if ray.is_initialized():
        return
    # Actors import the project from where this process found it.
    environment = {"PYTHONPATH": os.pathsep.join(p for p in _import_paths())}
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": environment}}
    options["logging_level"] = logging.WARNING
    failures.hush()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")  # a head that is gone: Ray ends this process
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other work on the machine stall the actors
    # Where several machines cannot form a cluster, Ray takes 127.0.0.1 for this node and all its servers bind to that.
    # It offers no other way: an address of 127.0.0.1 given to ray.init is replaced by the outer one.
    ray_constants.ENABLE_RAY_CLUSTER = bool(address)
    if address:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except OSError as error:
            if isinstance(error.__cause__, ray.exceptions.AuthenticationError):
                raise ClusterError(
                    f"cluster.address: the Ray cluster at '{address}' asks for a token; set RAY_AUTH_MODE=token, with "
                    "the token of its head in ~/.ray/auth_token"
                ) from error
            raise ClusterError(
                f"cluster.address: no Ray cluster answers at '{address}' ({error}); start one with "
                "`ray start --head`, or leave cluster.address out to run on this machine"
            ) from error
        return
    ray.init(
        address="local",  # else Ray would join whatever cluster it finds on this machine
        num_cpus=cpus or os.cpu_count() or 1,
        include_dashboard=False,
        object_store_memory=1 << 29,
        **options,
    )


def _knock(address: str, timeout_s: float = 10.0) -> None:
    """Raises OSError where nothing listens at host:port; Ray itself would try for minutes and then end the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=timeout_s).close()


def _import_paths() -> list[str]:
    import rlzero

    root = os.path.dirname(os.path.dirname(os.path.abspath(rlzero.__file__)))
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [root, *(p for p in inherited if p and p != root)]


def check_resources(placement: Placement) -> None:
    """Raises `ClusterError` with what the run needs and what the cluster has when some bundle cannot be placed, before
    anything is started: Ray itself would wait for ever."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    free = [dict(node) for node in nodes]
    bundles = placement.bundles
    unplaced = []
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0), -b["CPU"])):
        home = next((n for n in free if all(n.get(k, 0) >= v for k, v in bundle.items())), None)
        if home is None:
            unplaced.append(bundle)
            continue
        for key, value in bundle.items():
            home[key] -= value
    if unplaced:
        needs = "\n".join(f"    {resources(b)}: {placement.of_bundle(i)}" for i, b in enumerate(bundles))
        has = "\n".join(f"    {resources({k: v for k, v in n.items() if k in ('CPU', 'GPU')})}" for n in nodes)
        raise ClusterError(
            f"the cluster cannot hold the run: {len(unplaced)} of {len(bundles)} bundles of processes find no node\n"
            f"  needed (placement {placement.choice.kind}):\n{needs}\n  nodes of the cluster:\n{has}\n"
            "  lower rollout.workers or parallel.dp, set device or cluster.placement, or add nodes"
        )


class TrainerActor(Trainer):
    """One rank of the trainer as a Ray actor. The process is there first and `open` makes the trainer in it, because
    the ranks have to be told where rank 0 listens."""

    def __init__(self, rank: int):
        self._rank, self._listener, self._transport = rank, None, None

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

    def publish(self, transport: Any, version: int) -> Any:
        """The handle through which engines receive the weights of policy `version`: rank 0's. The other ranks take
        part in the gathering and return None."""
        if self._rank > 0:
            for _ in self.weights():
                pass
            return None
        if self._transport is None:
            self._transport = transport  # the first one stays: it keeps buffers and groups from sync to sync
        # These take the live tensors where they lie. Several ranks gather theirs layer by layer, onto the CPU.
        live = isinstance(transport, (IpcTransport, NcclTransport)) and self.ranks.size == 1
        return self._transport.publish(list(self.policy.weights()) if live else self.weights(), version)

    def forget_transport(self) -> None:
        """The next publication begins with a new one: of engines that an old one knew, one is gone."""
        if isinstance(self._transport, (IpcTransport, NcclTransport)):
            self._transport.close()
        self._transport = None

    def release(self) -> None:
        """Gives back the device memory that nothing holds at the moment."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pid(self) -> int:
        return os.getpid()


def _environment(threads: int, gpus: float) -> dict[str, str]:
    """What is read when a process imports torch. Oversubscribed cores cost more than idle ones; a process without a GPU
    of its own sees none; NVLink multicast on shared hosts can take their GPUs down, so it is used where asked for."""
    counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    found = {"TOKENIZERS_PARALLELISM": "false", **{name: str(threads) for name in counted}}
    if gpus:
        return {**found, "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    return {**found, "CUDA_VISIBLE_DEVICES": ""}


class Cluster:
    """A run's place on a Ray cluster: one placement group, trainer ranks, rollout workers. A context manager: on
    leaving, every process it started is gone."""

    def __init__(self, config: Config):
        self.config = config
        self.placement = plan(config)
        self.group: PlacementGroup | None = None
        self._started_ray = not ray.is_initialized() and config.cluster.address is None

    def __enter__(self) -> Cluster:
        connect(self.config.cluster.address, self.placement.local_cpus)
        try:
            check_resources(self.placement)
            self.group = placement_group(self.placement.bundles, strategy="PACK")
            deadline_s = self.config.cluster.deadline_s
            until_s = time.monotonic() + deadline_s
            while not (placed := self.group.wait(min(5.0, deadline_s))) and time.monotonic() < until_s:
                check_resources(self.placement)  # a node may have died since: then Ray would wait for it for ever
            if not placed:
                there, free = ray.cluster_resources(), ray.available_resources()
                used = {key: there[key] - free.get(key, 0) for key in ("CPU", "GPU") if key in there}
                raise ClusterError(
                    "the cluster has the resources but did not free them within cluster.deadline_s = "
                    f"{deadline_s:g} s; in use: {resources(used)}"
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.group is not None and ray.is_initialized():
            remove_placement_group(self.group)  # kills the actors placed in it
            self.group = None
        if self._started_ray and ray.is_initialized():
            ray.shutdown()

    def start(self, cls: type, process: Process, name: str, args: tuple, kwargs: dict[str, Any], threads: int) -> Actor:
        """An actor of `cls` in the process's bundle of the placement group, with so many CPU threads."""
        gpus = process.resources.get("GPU", 0)
        handle = (
            ray.remote(failures.reporting(cls))
            .options(
                num_cpus=process.resources["CPU"],
                num_gpus=gpus,
                max_restarts=0,
                runtime_env={"env_vars": _environment(threads, gpus)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=process.bundle
                ),
            )
            .remote(*args, **kwargs)
        )
        return Actor(handle, name)

    async def replaced(self) -> None:
        """Waits until every process of the run has a living node. Ray moves what ran on a dead node to others that have
        room; raises `ClusterError` where none has after REPLACE_S: an actor without a home would wait for ever."""
        until_s = time.monotonic() + REPLACE_S
        while True:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            homes = placement_group_table(self.group)["bundles_to_node_id"]
            bundles = self.placement.bundles
            lost = [i for i in range(len(bundles)) if homes.get(i) not in {n["NodeID"] for n in nodes}]
            if not lost:
                return
            if time.monotonic() > until_s:
                names = ", ".join(self.placement.of_bundle(i) for i in lost)
                needs = "; ".join(resources(bundles[i]) for i in lost)
                raise ClusterError(
                    f"a node of the cluster died, and no other has room for what ran on it: {names}, needing {needs}. "
                    f"{len(nodes)} node(s) are alive; bring the node back or lower rollout.workers, then --resume"
                )
            await asyncio.sleep(0.5)

    def trainer(self, *args: Any, **kwargs: Any) -> TrainerHandle:
        """All ranks of the trainer. Arguments are those of `Trainer`."""
        threads, count = self.placement.rank_threads, len(self.placement.ranks)
        ranks = [
            self.start(TrainerActor, process, "trainer" if count == 1 else f"trainer rank {i}", (i,), {}, threads)
            for i, process in enumerate(self.placement.ranks)
        ]
        return TrainerHandle(ranks, self.config.rollout.deadline_s, args, {**kwargs, "threads": threads})

    def worker(self, index: int, kind: str, folder: str, options: dict[str, Any]) -> Actor:
        process, threads = self.placement.workers[index], self.placement.worker_threads
        kwargs = {"options": options, "threads": threads}
        return self.start(RolloutWorker, process, f"rollout worker {index}", (kind, folder), kwargs, threads)


class Actor:
    """A Ray actor with a name for people. Every call has a deadline."""

    def __init__(self, handle: Any, name: str):
        self.handle, self.name = handle, name

    def submit(self, method: str, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        return getattr(self.handle, method).remote(*args, **kwargs)

    async def call(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """What `method` returns. Raises `ClusterError` when it takes longer than `deadline_s`, Ray's `RayActorError`
        when the process is gone, and `TrainerDied` when weights it was handed are gone with the trainer."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self.submit(method, *args, **kwargs)
        except TimeoutError as error:
            raise ClusterError(
                f"{self.name} did not answer '{method}' within {deadline_s:g} s and is taken for hung; if the work "
                "really takes that long, raise rollout.deadline_s (cluster.deadline_s for the start)"
            ) from error
        except ray.exceptions.ObjectLostError as error:  # published weights, the only objects an actor makes
            raise TrainerDied(f"the trainer's process died before {self.name} had its weights: {error}") from error
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
