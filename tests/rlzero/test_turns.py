"""Trainer and engine that share a device: they take turns, in an order that never needs both at once."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl.run import Run
from rollout.engine import EngineUnusable

pytestmark = pytest.mark.timeout(400)


class WatchedRun(Run):
    """A run that tries the engines whenever they should sleep."""

    refused = 0

    async def make_room(self) -> None:
        await super().make_room()
        try:
            await self.pool.score(self.probe[:1], 1.0)
        except EngineUnusable as error:
            assert "asleep" in str(error)
            self.refused += 1


def test_sleeping_engines_and_shared_buffers_change_no_number(local_ray, write_config, tmp_path):
    turns = {"rollout.transport": "ipc", "rollout.engine_args": {"sleep_level": 1}}
    lines = []
    for changes in ({}, turns):
        short = {"steps": 2, "data.evaluation": None, "evaluation.every": 0, "checkpoint.every": 0}
        config = Config.load(write_config(tmp_path / str(len(lines)), **short, **changes))

        async def go(config: Config = config) -> int:
            async with WatchedRun(config, resume=False) as run:
                await loop.train(run)
                return run.refused

        assert asyncio.run(go()) == (config.steps if changes else 0)
        lines.append(read_lines(config.run_dir / "metrics.jsonl"))
    for name in ("reward_mean", "policy_loss", "grad_norm", "length_mean", "sync_gap"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_worker_that_dies_asleep_comes_back_when_the_trainer_has_made_room(
    transport, local_ray, write_config, tmp_path
):
    """Started at once it would take memory in which the trainer works."""
    changes = {"rollout.transport": transport, "rollout.engine_args": {"sleep_level": 2}, "rollout.workers": 2}
    config = Config.load(write_config(tmp_path, **changes, **{"data.evaluation": None, "evaluation.every": 0}))

    async def go() -> None:
        async with Run(config, resume=False) as run:
            graded = await loop.collect(run, 0)
            pids = [(await worker.call("ping", deadline_s=30))["pid"] for worker in run.pool.workers]
            os.kill(pids[1], signal.SIGKILL)
            psutil.Process(pids[1]).wait(10)
            await run.make_room()  # tells a dead worker to sleep
            batches = loop.minibatches(loop.to_samples(graded, config.algorithm), config)
            await run.trainer.call("step", batches)
            os.kill(pids[0], signal.SIGKILL)  # and this one dies while it sleeps
            assert run.pool.restarts == 0 and run.pool.asleep
            await run.publish(version=1)  # raises where an engine then holds other weights than the trainer
            assert run.pool.restarts == 2
            answers = [await worker.call("ping", deadline_s=30) for worker in run.pool.workers]
            assert [answer["version"] for answer in answers] == [1, 1]
            groups = await run.writer.all("1.0", run.prompts.take(4), 2, run.sampling)
            assert all(r.versions == [(1, len(r.tokens))] for g in groups for r in g.rollouts)

    asyncio.run(go())


def test_engines_that_write_while_the_trainer_trains_are_not_sent_to_sleep(write_config, tmp_path):
    changes = {"rollout.engine_args": {"sleep_level": 1}, "staleness": 1, "loss.correction": "tis"}
    with pytest.raises(UsageError, match="cannot sleep"):
        Run(Config.load(write_config(tmp_path, **changes)), resume=False)
