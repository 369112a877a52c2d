"""Ray: what a run needs of a cluster, its actors, their deadlines, and what happens when one dies.

Nothing else in the project calls Ray's placement or supervision.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from dataclasses import dataclass
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
from rlzero.reading import UsageError
from rollout.transport.ipc import IpcTransport
from rollout.transport.nccl import NcclTransport
from rollout.worker import RolloutWorker
from trainer.worker import Trainer

SHOWN = 12  # lines of an error of a start
REPLACE_S = 20.0  # how long Ray gets to find another node for what ran on a dead one


class ClusterError(RuntimeError):
    """The cluster cannot hold the run, or an actor of it failed for good."""


class TrainerDied(ClusterError):
    """The trainer's process is gone; the run goes on from its last checkpoint."""


@dataclass(frozen=True)
class Placement:
    """What each process of a run gets: Ray resources and CPU threads."""

    trainer: dict[str, float]
    workers: list[dict[str, float]]
    trainer_threads: int
    worker_threads: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [self.trainer, *self.workers]

    @property
    def local_cpus(self) -> int:
        """CPUs that a Ray of the run's own offers: this machine's, or what the run needs to be placed, if that is more.
        Processes that take turns share cores; their threads are counted for that."""
        return max(os.cpu_count() or 1, math.ceil(sum(bundle["CPU"] for bundle in self.bundles)))

    def describe(self, together: bool, cores: int | None = None) -> str:
        """How the processes share this machine's cores, in a line; `together`: trainer and workers work at once."""
        cores, count = cores or os.cpu_count() or 1, len(self.workers)
        written = count * self.worker_threads
        busiest = self.trainer_threads + written if together else max(self.trainer_threads, written)
        line = (
            f"threads    trainer {self.trainer_threads}, each of {count} rollout worker(s) {self.worker_threads}, "
            f"{'at the same time' if together else 'in turn'}: at most {busiest} busy on {cores} core(s)"
        )
        if busiest > cores:
            line += "; more than there are, so they slow each other down"
        if self.local_cpus > cores:
            line += f"; a Ray of the run's own is told of {self.local_cpus} CPUs so that all of them are placed"
        return line


def plan(config: Config, cores: int | None = None) -> Placement:
    """The placement that `config` asks for. Synchronous runs on a CPU take turns, so trainer and workers may each use
    every core; where they work at the same time the cores are shared out. Each has a GPU of its own, but with
    rollout.transport: ipc, which is for one device, they share one."""
    cores = cores or os.cpu_count() or 1
    share = 1.0 / (1 + config.rollout.workers) if config.rollout.transport == "ipc" else 1.0
    gpu = {"GPU": share} if config.device == "cuda" else {}
    together = config.staleness > 0
    shares = 1 + config.rollout.workers if together else 1
    threads = max(1, cores // shares)
    per_worker = max(1, threads // (1 if together else config.rollout.workers))
    return Placement(
        trainer={"CPU": 1.0, **gpu},
        workers=[{"CPU": 1.0, **gpu} for _ in range(config.rollout.workers)],
        trainer_threads=config.trainer_threads or threads,
        worker_threads=config.rollout.threads or per_worker,
    )


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
    unplaced = []
    for bundle in sorted(placement.bundles, key=lambda b: -sum(b.values())):
        home = next((n for n in free if all(n.get(k, 0) >= v for k, v in bundle.items())), None)
        if home is None:
            unplaced.append(bundle)
            continue
        for key, value in bundle.items():
            home[key] -= value
    if unplaced:
        needs = "\n".join(f"    {_resources(b)}" for b in placement.bundles)
        has = "\n".join(f"    {_resources({k: v for k, v in n.items() if k in ('CPU', 'GPU')})}" for n in nodes)
        raise ClusterError(
            f"the cluster cannot hold the run: {len(unplaced)} of {len(placement.bundles)} processes find no node\n"
            f"  needed (trainer first, then rollout workers):\n{needs}\n  nodes of the cluster:\n{has}\n"
            "  lower rollout.workers, set device, or add nodes"
        )


def _resources(bundle: dict[str, float]) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in sorted(bundle.items())) or "nothing"


class TrainerActor(Trainer):
    """The trainer as a Ray actor: what it computes plus handing its weights to a transport."""

    _transport: Any = None

    def publish(self, transport: Any, version: int, mtp: bool = False) -> Any:
        """The handle through which engines receive the weights of policy `version`; with `mtp` also those of its layers
        of multi-token prediction, for engines that draft with them."""
        if type(self._transport) is not type(transport):
            self._transport = transport  # the first one stays: it keeps buffers and groups from sync to sync
        # These take the live tensors where they lie. Several ranks gather theirs layer by layer, onto the CPU.
        live = isinstance(transport, (IpcTransport, NcclTransport)) and self.ranks.size == 1
        return self._transport.publish(list(self.policy.weights(mtp)) if live else self.weights(mtp), version)

    def release(self) -> None:
        """Gives back the device memory that nothing holds at the moment."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pid(self) -> int:
        return os.getpid()


def _environment(threads: int) -> dict[str, str]:
    """Thread counts of one process, set before it imports torch: oversubscribed cores cost more than idle ones."""
    counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {"TOKENIZERS_PARALLELISM": "false", **{name: str(threads) for name in counted}}


class Cluster:
    """A run's place on a Ray cluster: one placement group, one trainer, some rollout workers. A context manager: on
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
                    f"{deadline_s:g} s; in use: {_resources(used)}"
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

    def start(self, cls: type, index: int, name: str, args: tuple, kwargs: dict[str, Any]) -> Actor:
        """An actor of `cls` in bundle `index` of the placement group; `kwargs["threads"]` are its CPU threads."""
        bundle = self.placement.bundles[index]
        handle = (
            ray.remote(failures.reporting(cls))
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                runtime_env={"env_vars": _environment(kwargs["threads"])},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
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
            lost = [i for i in range(len(self.placement.bundles)) if homes.get(i) not in {n["NodeID"] for n in nodes}]
            if not lost:
                return
            if time.monotonic() > until_s:
                names = ", ".join("the trainer" if i == 0 else f"rollout worker {i - 1}" for i in lost)
                needs = "; ".join(_resources(self.placement.bundles[i]) for i in lost)
                raise ClusterError(
                    f"a node of the cluster died, and no other has room for what ran on it: {names}, needing {needs}. "
                    f"{len(nodes)} node(s) are alive; bring the node back or lower rollout.workers, then --resume"
                )
            await asyncio.sleep(0.5)

    def trainer(self, *args: Any, **kwargs: Any) -> TrainerHandle:
        actor = self.start(TrainerActor, 0, "trainer", args, {**kwargs, "threads": self.placement.trainer_threads})
        return TrainerHandle(actor, self.config.rollout.deadline_s)

    def worker(self, index: int, kind: str, folder: str, options: dict[str, Any]) -> Actor:
        kwargs = {"options": options, "threads": self.placement.worker_threads}
        return self.start(RolloutWorker, 1 + index, f"rollout worker {index}", (kind, folder), kwargs)


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

    async def opened(self, deadline_s: float) -> None:
        """Waits until the process has made what it owns. Raises `UsageError` where what it was given cannot be used."""
        try:
            await self.call("opened", deadline_s=deadline_s)
        except (FileNotFoundError, ValueError) as error:
            lines = str(error).splitlines()
            shown = lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  ... and {len(lines) - SHOWN} more lines"]
            raise UsageError(f"{self.name} cannot start: " + "\n".join(shown)) from error

    def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)


class TrainerHandle:
    """Calls on the trainer actor; its death becomes `TrainerDied`."""

    def __init__(self, actor: Actor, deadline_s: float):
        self.actor, self.deadline_s = actor, deadline_s

    async def ready(self, deadline_s: float) -> None:
        """Waits until the trainer has loaded its policy."""
        await self.actor.opened(deadline_s)

    async def call(self, method: str, *args: Any, deadline_s: float | None = None, **kwargs: Any) -> Any:
        try:
            return await self.actor.call(method, *args, deadline_s=deadline_s or self.deadline_s, **kwargs)
        except ray.exceptions.RayActorError as error:
            raise TrainerDied(f"the trainer's process died during '{method}' ({failures.death(error)})") from error
