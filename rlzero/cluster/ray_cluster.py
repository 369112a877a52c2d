"""Ray: joining or starting a cluster, what a run needs of it, and the start of actors in their places.

Nothing else in the project calls Ray's placement; what an actor is stands in rlzero.cluster.actors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.job_config import JobConfig
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlzero import interrupt
from rlzero.cluster import errors as failures
from rlzero.cluster import local_ray
from rlzero.cluster.actors import Actor, ClusterError, TrainerActor, TrainerHandle
from rlzero.cluster.placement import Placement, Process, on_gpus, plan, resources
from rlzero.config.rl import Config
from rollout.worker import RolloutWorker

REPLACE_S = 20.0  # how long Ray gets to find another node for what ran on a dead one


def connect(address: str | None, cpus: int | None = None, store_bytes: int | None = 1 << 29) -> None:
    """Joins the cluster at `address` (`auto`: the one running here), or starts one on this machine that listens on
    loopback only and offers `cpus` (none: as many as there are) and an object store of `store_bytes` (none: Ray's share
    of the memory). Ray counts CPUs for placement only: how many threads each process takes is set by `plan`."""
    if ray.is_initialized():
        return
    # Actors import the project from where this process found it, and nothing from the folder they are started in.
    environment = {"PYTHONPATH": os.pathsep.join(_import_paths()), "PYTHONSAFEPATH": "1"}
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": environment}}
    options |= {"logging_level": logging.WARNING, "job_config": _Job()}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")  # a head that is gone: Ray ends this process
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # processes that nobody uses: actors get their own
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other work on the machine stall the actors
    # Where several machines cannot form a cluster, Ray takes 127.0.0.1 for this node and all its servers bind to that.
    # It offers no other way: an address of 127.0.0.1 given to ray.init is replaced by the outer one.
    ray_constants.ENABLE_RAY_CLUSTER = bool(address)
    if not address:
        local_ray.start(
            num_cpus=cpus or os.cpu_count() or 1, include_dashboard=False, object_store_memory=store_bytes, **options
        )
        return
    if address == "auto":  # Ray's own search would also find the private Ray of another run
        address = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
        if not address:
            raise ClusterError(
                "cluster.address: auto, but `ray start` has made no cluster on this machine and RAY_ADDRESS is not "
                "set; give host:port of its head, or leave cluster.address out to run on this machine"
            )
    try:
        _knock(address)
        ray.init(address=address, **options)
        interrupt.keep_handlers()
    except (OSError, RuntimeError) as error:
        if isinstance(error, ray.exceptions.AuthenticationError) or "token" in f"{error} {error.__cause__}":
            raise ClusterError(
                f"cluster.address: the Ray cluster at '{address}' asks for a token; set RAY_AUTH_MODE=token, with "
                "the token of its head in ~/.ray/auth_token"
            ) from error
        raise ClusterError(
            f"cluster.address: no Ray cluster answers at '{address}' ({error}); start one with "
            "`ray start --head`, or leave cluster.address out to run on this machine"
        ) from error


class _Job(JobConfig):
    """Ray puts the folder that a run is started in before all packages in its workers: a file random.py there would be
    taken for Python's."""

    def _serialize(self) -> str:
        self._py_driver_sys_path = []
        return super()._serialize()


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


def _environment(threads: int, gpus: float) -> dict[str, str]:
    """What is read when a process imports torch. Oversubscribed cores cost more than idle ones; a process without a GPU
    of its own sees none; NVLink multicast on shared hosts can take their GPUs down, so it is used where asked for."""
    counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    found = {"TOKENIZERS_PARALLELISM": "false", **{name: str(threads) for name in counted}}
    # A thread that waits for the others spins, and on a busy machine keeps them from their cores.
    found["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")
    if gpus:
        return {**found, "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    return {**found, "CUDA_VISIBLE_DEVICES": ""}


class Cluster:
    """A run's place on a Ray cluster: one placement group, trainer ranks, rollout workers; an evaluation's has no
    `trainer`. A context manager: on leaving, every process it started is gone."""

    def __init__(self, config: Config, trainer: bool = True):
        self.config = config
        self.placement = plan(config, trainer=trainer)
        self.group: PlacementGroup | None = None
        self._started_ray = not ray.is_initialized() and config.cluster.address is None

    def __enter__(self) -> Cluster:
        store_bytes = None if on_gpus(self.config) else 1 << 29
        connect(self.config.cluster.address, self.placement.local_cpus, store_bytes)
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
