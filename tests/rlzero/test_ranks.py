"""`rlzero train` on several trainer ranks: real Ray, gloo between the ranks, the numbers of one rank."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rlzero.cluster.actors import ClusterError, TrainerDied, TrainerHandle
from rlzero.cluster.ray_cluster import Cluster
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl.run import Run

from .conftest import STEPS, Train

pytestmark = pytest.mark.timeout(500)

BOUND = 1e-5  # between the metrics of one rank and of two, in float32: sums in another order
RANKS = {"dp": {"parallel.dp": 2}, "ep": {"parallel.dp": 2, "parallel.ep": 2}}
QUIET = {"data.evaluation": None, "evaluation.every": 0}


def assert_same_metrics(run_dir: Path, expected: Path, steps: range) -> None:
    """Every metric of these steps is that of the other run, but for times and for how far the engine was off."""
    found, wanted = ({line["step"]: line for line in read_lines(d / "metrics.jsonl")} for d in (run_dir, expected))
    for step in steps:
        names = [n for n in wanted[step] if not n.startswith("time_") and n not in ("worker_restarts", "sync_gap")]
        assert set(names) <= set(found[step]), set(names) - set(found[step])
        for name in names:
            assert found[step][name] == pytest.approx(wanted[step][name], abs=BOUND, rel=BOUND), (step, name)
        assert found[step]["sync_gap"] < 1e-4


# --- the numbers of one rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks_train_to_the_metrics_of_one(kind, finished, write_config, tmp_path):
    with Train(write_config(tmp_path, steps=3, **RANKS[kind])) as train:
        assert train.wait() == 0, train.text
        assert not train.left_behind(10.0)
    assert_same_metrics(train.run_dir, finished, range(3))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(finished, write_config, tmp_path):
    for steps, ranks in ((2, RANKS["dp"]), (4, {}), (6, RANKS["ep"])):
        with Train(write_config(tmp_path, steps=steps, **ranks), "--resume") as train:
            assert train.wait() == 0, train.text
    assert_same_metrics(train.run_dir, finished, range(6))


@pytest.mark.parametrize(("placement", "transport"), [("colocated", "ipc"), ("disaggregated", "nccl")])
def test_the_weights_of_two_ranks_travel_while_they_are_gathered(
    placement, transport, local_ray, finished, write_config, tmp_path
):
    """Colocated each engine takes them from its own rank. Ranks share the experts out, engines hold all of them; one of
    the engines dies between the steps."""
    workers = 2 if placement == "colocated" else 1
    changes = {"cluster.placement": placement, "rollout.transport": transport, "rollout.workers": workers}
    config = Config.load(write_config(tmp_path, steps=3, **changes, **RANKS["ep"], **QUIET))

    class Shaken(Run):
        async def make_room(self) -> None:
            if self.version == 1:
                os.kill((await self.pool.workers[-1].call("ping", deadline_s=30))["pid"], signal.SIGKILL)
            await super().make_room()

    async def go() -> None:
        async with Shaken(config, resume=False) as run:
            await loop.train(run)
            assert run.pool.restarts == 1

    asyncio.run(go())
    assert_same_metrics(config.run_dir, finished, range(3))


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on_by_itself_to_the_same_metrics(finished, write_config, tmp_path):
    with Train(write_config(tmp_path, **RANKS["dp"])) as train:
        train.wait_for_step(2)
        ranks = [p for p in train.family() if " ".join(p.cmdline()).startswith("ray::TrainerActor")]
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert train.wait() == 0, train.text
        assert "the trainer rank" in train.text and "going on from step-00000" in train.text
        assert not train.left_behind(10.0)
    assert_same_metrics(train.run_dir, finished, range(STEPS))


@pytest.mark.slow
def test_ranks_listen_at_loopback_alone(write_config, tmp_path):
    with Train(write_config(tmp_path, steps=500, **RANKS["dp"], **QUIET)) as train:
        train.wait_for_step(1)
        listening = {
            c.laddr.ip for p in train.family() for c in p.net_connections(kind="inet") if c.status == "LISTEN"
        }
        os.killpg(train.process.pid, signal.SIGINT)
        assert train.wait(60) == 130, train.text
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


# --- what one rank meets with ----------------------------------------------------------------------------------------


async def prepared(run: Run) -> list[list]:
    graded = await loop.collect(run, run.step)
    return loop.minibatches(loop.to_samples(graded, run.config.algorithm), run.config)


def test_the_death_of_rank_1_is_named_soon(local_ray, write_config, tmp_path):
    async def go() -> None:
        async with Run(Config.load(write_config(tmp_path, **RANKS["dp"], **QUIET)), resume=False) as run:
            batches = await prepared(run)
            pids = await run.trainer.each("pid")
            assert len(set(pids)) == 2
            os.kill(pids[1], signal.SIGSTOP)  # so that rank 0 is inside a collective when it dies
            step = asyncio.create_task(run.trainer.call("step", batches))
            await asyncio.sleep(1.0)
            os.kill(pids[1], signal.SIGKILL)
            began_s = time.monotonic()
            with pytest.raises(TrainerDied, match="the trainer rank 1's process died during 'step'"):
                await step
            assert time.monotonic() - began_s < 20
            _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=10)
            assert not alive

    asyncio.run(go())


class Rank:
    """Stands for a rank of a trainer whose others wait for it in a collective."""

    def __init__(self, rank: int):
        self.rank = rank

    def pid(self) -> int:
        return os.getpid()

    def work(self, batches: Any) -> int:
        if self.rank == 1:
            raise ValueError(f"rank {self.rank} cannot use {type(batches).__name__} {batches}")
        time.sleep(300)
        return self.rank


def test_what_one_rank_raises_arrives_as_itself_and_the_others_do_not_keep_it(local_ray, write_config, tmp_path):
    async def go(started: Cluster) -> None:
        places = started.placement.ranks
        ranks = [started.start(Rank, place, f"trainer rank {i}", (i,), {}, 1) for i, place in enumerate(places)]
        handle = TrainerHandle(ranks, 300.0, (), {})
        pids = await handle.each("pid")
        began_s = time.monotonic()
        with pytest.raises(ValueError, match=r"rank 1 cannot use list \[1, 2\]") as caught:  # not a reference to it
            await handle.call("work", [1, 2])
        assert time.monotonic() - began_s < 10
        assert caught.value.__notes__ == ["raised by 'work' of trainer rank 1"]
        _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=10)
        assert not alive

    with Cluster(Config.load(write_config(tmp_path, **RANKS["dp"]))) as started:
        asyncio.run(go(started))


def test_ranks_that_cannot_load_their_policy_end_the_start_with_what_is_wrong(local_ray, write_config, tmp_path):
    changes = {"policy.path": str(tmp_path / "gone"), **RANKS["dp"]}

    async def go(started: Cluster) -> None:
        config = started.config
        trainer = started.trainer(
            config.policy, config.optimizer, config.loss, device="cpu", parallel=config.parallel
        )
        with pytest.raises(UsageError, match=r"trainer rank \d cannot start(.|\n)*gone"):
            await trainer.ready(100.0)

    with Cluster(Config.load(write_config(tmp_path, **changes))) as started:
        asyncio.run(go(started))


def test_ranks_that_the_cluster_cannot_hold_are_refused_before_anything_starts(local_ray, write_config, tmp_path):
    config = Config.load(write_config(tmp_path, **{"parallel.dp": 5}))
    with pytest.raises(ClusterError) as caught:
        Cluster(config).__enter__()
    assert "2 of 6 bundles of processes find no node" in str(caught.value)
    assert "1 CPU: trainer rank 4" in str(caught.value)
    groups = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in groups)
