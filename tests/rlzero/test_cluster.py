"""Placement: what a run needs against what a cluster has, and a cluster of two nodes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from rlzero import launch
from rlzero.cluster import ray_cluster as cluster
from rlzero.cluster.actors import ClusterError
from rlzero.cluster.placement import plan
from rlzero.cluster.ray_cluster import Cluster, check_resources
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl.run import Run
from trainer.checkpoint.checkpoint import CheckpointError

pytestmark = pytest.mark.timeout(300)


# --- what each process gets ------------------------------------------------------------------------------------------


def test_synchronous_processes_share_cores_in_turn_and_asynchronous_ones_at_once(write_config, tmp_path):
    def threads(**changes) -> tuple[int, int]:
        changes = {"threads": 0, "loss.correction": "tis", **changes}
        placement = plan(Config.load(write_config(tmp_path, **changes)), cores=12)
        return placement.rank_threads, placement.worker_threads

    assert threads() == (12, 12)
    assert threads(**{"rollout.workers": 3}) == (12, 4)
    assert threads(**{"rollout.workers": 3}, staleness=1) == (3, 3)
    assert threads(**{"rollout.workers": 30}) == (12, 1)
    assert threads(**{"parallel.dp": 2, "rollout.workers": 3}) == (6, 4)
    assert threads(**{"parallel.dp": 3, "rollout.workers": 3}, staleness=1) == (2, 2)
    assert threads(threads=5) == (5, 5)


def test_more_processes_than_cores_are_placed_and_the_plan_says_how_they_share_them(write_config, tmp_path):
    """A Ray of the run's own offers what the run needs: processes that take turns are no shortage."""
    workers = os.cpu_count() or 1
    config = Config.load(write_config(tmp_path, threads=0, **{"rollout.workers": workers}))
    placement = plan(config, cores=workers)
    assert placement.worker_threads == 1 and placement.local_cpus == workers + 1
    said = placement.threads_line(together=False, cores=workers)
    assert f"in turn: at most {workers} busy on {workers} core(s); a Ray of the run's own is told of" in said
    assert "slow each other down" in placement.threads_line(together=True, cores=workers)
    ray.shutdown()
    with Cluster(config) as started:
        assert ray.cluster_resources()["CPU"] == workers + 1
        assert ray.util.placement_group_table(started.group)["state"] == "CREATED"
    assert not ray.is_initialized()


# --- errors of another process ---------------------------------------------------------------------------------------


class Picky:
    """Stands for a trainer or an engine: what it raises is raised in a process of its own."""

    def __init__(self, broken: str = ""):
        if broken:
            raise {"path": FileNotFoundError, "bug": RuntimeError}[broken](f"no {broken} here")

    def save(self) -> None:
        raise CheckpointError("step-3 was not written: the disk is full")

    def stumble(self) -> None:
        class Local(Exception):
            def __reduce__(self):
                raise TypeError("not to be sent")

        raise Local("only here")


def test_what_an_actor_raises_arrives_as_it_was_raised(local_ray, write_config, tmp_path):
    async def go(started: Cluster) -> None:
        actor = started.start(Picky, started.placement.workers[0], "rollout worker 0", (), {}, threads=1)
        await actor.opened(60)
        with pytest.raises(CheckpointError) as caught:
            await actor.call("save", deadline_s=60)
        assert type(caught.value) is CheckpointError
        assert str(caught.value) == "step-3 was not written: the disk is full"
        assert caught.value.__notes__ == ["raised by 'save' of rollout worker 0"]
        assert "in save" in str(caught.value.__cause__)  # the traceback of the other process is not lost
        with pytest.raises(ray.exceptions.RayTaskError, match="only here"):
            await actor.call("stumble", deadline_s=60)

    with Cluster(Config.load(write_config(tmp_path))) as started:
        asyncio.run(go(started))


def test_a_constructor_that_raises_is_no_death(local_ray, write_config, tmp_path):
    async def go(started: Cluster) -> None:
        places = [*started.placement.ranks, *started.placement.workers]
        for place, broken, error in zip(places, ("path", "bug"), (UsageError, RuntimeError), strict=True):
            actor = started.start(Picky, place, f"actor {broken}", (), {"broken": broken}, threads=1)
            with pytest.raises(error, match=f"no {broken} here"):
                await actor.opened(60)

    with Cluster(Config.load(write_config(tmp_path))) as started:
        asyncio.run(go(started))


# --- too small a cluster ---------------------------------------------------------------------------------------------


def test_a_run_that_needs_more_than_there_is_fails_with_both_lists(local_ray, write_config, tmp_path):
    config = Config.load(write_config(tmp_path, **{"rollout.workers": 6}))
    with pytest.raises(ClusterError) as caught:
        Cluster(config).__enter__()
    message = str(caught.value)
    assert "3 of 7 bundles of processes find no node" in message
    needed, there = message.split("needed (")[1].split("nodes of the cluster:")
    assert needed.count("1 CPU:") == 7 and there.count("4 CPU") == 1
    groups = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in groups)  # nothing was started


def test_gpus_that_are_not_there_are_missed(local_ray, write_config, tmp_path):
    config = Config.load(write_config(tmp_path, device="cuda", **{"cluster.placement": "disaggregated"}))
    with pytest.raises(ClusterError, match=r"2 of 2 bundles(.|\n)*1 CPU \+ 1 GPU(.|\n)*nodes(.|\n)*4 CPU"):
        check_resources(plan(config))


def test_an_address_where_no_cluster_answers_is_named():
    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began_s = time.monotonic()
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at '{address}'"):
        cluster.connect(address)
    assert time.monotonic() - began_s < 60


# --- a cluster of two nodes ------------------------------------------------------------------------------------------


class Nodes:
    """A Ray cluster of its own: a head and a second node, one CPU each, every process of it known and ended again."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="rz")  # short: Unix socket paths end after 107 characters
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.nodes: list[subprocess.Popen] = []

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", *arguments]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.nodes.append(
            subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )

    def __enter__(self) -> Nodes:
        port = self.address.rpartition(":")[2]
        self.start("--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false")
        until_s = time.monotonic() + 60
        while not _answers(int(port)):
            assert self.nodes[0].poll() is None, self.nodes[0].stdout.read().decode()
            assert time.monotonic() < until_s, "the head did not start"
            time.sleep(0.1)
        self.start(f"--address={self.address}")
        return self

    def __exit__(self, *_: object) -> None:
        processes = [p for node in self.nodes for p in _family(node.pid)]
        for node in self.nodes[::-1]:
            node.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=15)
        for process in alive:
            process.kill()
        for node in self.nodes:
            node.wait()
            node.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """For the tests at the end of this file, the last of which takes a node away."""
    ray.shutdown()
    with Nodes() as nodes:
        yield nodes
        ray.shutdown()


def test_a_run_joins_a_cluster_and_works_on_both_of_its_nodes(two_nodes, write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)  # `auto` looks here first, and this machine may run others
    config = Config.load(write_config(tmp_path, steps=2, **{"cluster.address": "auto", "evaluation.every": 0}))
    _await_nodes("auto", 2)

    homes = [node.pid for node in two_nodes.nodes]
    placed: list[int] = []
    actors: list[int] = []

    class Seen(Run):
        async def publish(self, version: int) -> None:
            await super().publish(version)
            if not actors:
                worker = await self.pool.workers[0].call("ping", deadline_s=30)
                actors.extend([await self.trainer.call("pid"), worker["pid"]])
                placed.extend(home for pid in actors for home in homes if pid in {p.pid for p in _family(home)})

    async def train() -> None:
        async with Seen(config, resume=False) as run:
            await loop.train(run)

    asyncio.run(train())
    assert sorted(placed) == sorted(homes)
    assert len(read_lines(config.run_dir / "metrics.jsonl")) == 2
    assert ray.is_initialized()  # the cluster is somebody else's
    _, alive = psutil.wait_procs([psutil.Process(p) for p in actors if psutil.pid_exists(p)], timeout=10)
    assert not alive
    assert all(node.poll() is None for node in two_nodes.nodes)


@pytest.mark.slow
def test_a_run_that_loses_a_node_says_what_has_no_home(two_nodes, write_config, tmp_path, monkeypatch):
    """One of the run's two processes loses its node, and no other has room for it. Whichever it was: a worker's place
    is not filled again, or the resumed run cannot be placed."""
    monkeypatch.setattr(cluster, "REPLACE_S", 3.0)
    config = Config.load(
        write_config(tmp_path, steps=500, **{"cluster.address": two_nodes.address, "evaluation.every": 0})
    )
    _await_nodes(two_nodes.address, 2)
    killed_s: list[float] = []

    def kill_a_node() -> None:
        while not any(line["step"] >= 1 for line in read_lines(config.run_dir / "metrics.jsonl")):
            time.sleep(0.05)
        killed_s.append(time.monotonic())
        for process in _family(two_nodes.nodes[1].pid):
            process.kill()

    killer = threading.Thread(target=kill_a_node, daemon=True)
    killer.start()
    with pytest.raises(ClusterError, match="a node of the cluster died|the cluster cannot hold the run") as caught:
        launch.train(config, resume=False)
    assert killed_s and time.monotonic() - killed_s[0] < 60
    assert "1 CPU" in str(caught.value)


def _await_nodes(address: str, count: int) -> None:
    cluster.connect(address)
    until_s = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) < count:
        assert time.monotonic() < until_s, f"no {count} nodes: {ray.nodes()}"
        time.sleep(0.1)
