"""What a run survives: kills of everything, of a worker, of the trainer; hangs; Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewards.load import RewardError
from rewards.score import Score
from rlzero import run_folder
from rlzero.cluster.actors import ClusterError, TrainerDied
from rlzero.config.rl import Algorithm, Config, Reward
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl.groups import Group, grade
from rlzero.rl.run import Run
from rollout.engine import Prompt, Rollout
from trainer.checkpoint import checkpoint

from .conftest import STEPS, Train, _title

pytestmark = pytest.mark.timeout(500)

def weights(run_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Everything numeric that a checkpoint holds, as bytes."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def told(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics without what may differ between equal runs: times, restarts, and the gap after a publication,
    of which a resumed run makes one more."""
    lines = read_lines(run_dir / "metrics.jsonl")
    vary = ("worker_restarts", "sync_gap")
    return [{k: v for k, v in line.items() if not k.startswith("time_") and k not in vary} for line in lines]


@pytest.mark.parametrize("kills", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_sigkills_at_random_moments_change_no_bit_of_the_result(kills, finished, write_config, tmp_path):
    config = write_config(tmp_path)
    rng = random.Random(20)
    for kill in range(kills):
        with Train(config, "--resume") as train:
            train.wait_for_step(kill)  # so far every run has come one step further than the one before
            time.sleep(rng.uniform(0, 0.5))
            train.family()
            assert train.process.poll() is None, "the run was over before it was killed"
            train.kill()
            assert not train.left_behind(20.0)
    with Train(config, "--resume") as train:
        assert train.wait() == 0, train.text
    assert weights(train.run_dir) == weights(finished)
    assert told(train.run_dir) == told(finished)


def test_a_run_whose_trainer_dies_goes_on_by_itself_to_the_same_result(finished, write_config, tmp_path):
    with Train(write_config(tmp_path)) as train:
        train.wait_for_step(2)
        trainer = train.actor("TrainerActor")
        os.kill(trainer.pid, signal.SIGKILL)
        assert train.wait() == 0, train.text
        assert "the trainer's process died" in train.text and "going on from step-00000" in train.text
        assert not train.left_behind(10.0)
    assert weights(train.run_dir) == weights(finished)
    assert told(train.run_dir) == told(finished)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_saves_exits_with_its_code_and_leaves_nothing_behind(number, code, write_config, tmp_path):
    with Train(write_config(tmp_path, steps=500, **{"checkpoint.every": 0})) as train:
        train.wait_for_step(1)
        family = train.family()
        assert {"127.0.0.1"} >= listening(family) != set()
        os.killpg(train.process.pid, number)  # to the whole group, as a terminal and Slurm do
        assert train.wait(30) == code, train.text
        assert "stopped before step" in train.text and "--resume" in train.text and "Traceback" not in train.text
        assert not train.left_behind(10.0)
    saved = checkpoint.latest(train.run_dir / "checkpoints")
    done = read_lines(train.run_dir / "metrics.jsonl")[-1]["step"]
    assert saved is not None and saved.name == f"step-{done + 1:06d}"
    checkpoint.verify(saved)


def test_a_run_in_an_evaluation_whose_reward_hangs_ends_in_ten_seconds(write_config, tmp_path):
    reward = tmp_path / "hangs.py"
    reward.write_text("import time\ndef score(completion, **row):\n    time.sleep(1000)\n")
    with Train(write_config(tmp_path, rewards=[{"fn": f"{reward}:score", "timeout_s": 900}])) as train:
        until_s = time.monotonic() + 60
        while not any("RolloutWorker" in _title(p) for p in train.family()):
            assert time.monotonic() < until_s and train.process.poll() is None, train.text
            time.sleep(0.1)
        time.sleep(6)
        os.killpg(train.process.pid, signal.SIGINT)
        assert train.wait(12) == 130, train.text
        assert not train.left_behind(10.0)


class Evaluation(Train):
    command = ("rlzero.cli", "eval")


def test_an_evaluation_that_is_ended_says_so_and_leaves_nothing_behind(write_config, tmp_path):
    reward = tmp_path / "hangs.py"
    reward.write_text("import time\ndef score(completion, **row):\n    time.sleep(1000)\n")
    with Evaluation(write_config(tmp_path, rewards=[{"fn": f"{reward}:score", "timeout_s": 900}])) as command:
        until_s = time.monotonic() + 60
        while not any("RolloutWorker" in _title(p) for p in command.family()):
            assert time.monotonic() < until_s and command.process.poll() is None, command.text
            time.sleep(0.1)
        os.killpg(command.process.pid, signal.SIGTERM)
        assert command.wait(12) == 143, command.text
        assert "interrupted" in command.text and "SIGTERM received" not in command.text
        assert not command.left_behind(10.0)


def test_a_second_run_in_the_same_folder_is_refused_and_a_lock_of_a_dead_one_is_not(write_config, tmp_path):
    config = write_config(tmp_path, steps=500, **{"checkpoint.every": 0})
    with Train(config) as train:
        train.wait_for_step(0)
        with Train(config, "--resume") as second:
            assert second.wait(60) == 2
            assert f"process {train.process.pid} on" in second.text and "name=" in second.text
        train.kill()
    with Train(config, "--resume", "steps=1") as third:
        assert third.wait(100) == 0, third.text


def test_files_named_like_the_products_packages_do_no_harm(write_config, tmp_path):
    config = write_config(tmp_path, steps=1)
    for name in ("trainer", "rollout", "rewards", "datasets", "random", "config"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    with Train(config) as train:
        assert train.wait(100) == 0, train.text


def test_sigterm_to_every_process_saves_and_the_resumed_run_equals_the_uninterrupted_one(
    finished, write_config, tmp_path
):
    """As Slurm sends it: Ray's own processes and the actors get it, too."""
    config = write_config(tmp_path)
    with Train(config) as train:
        train.wait_for_step(1)
        for process in train.family():
            process.send_signal(signal.SIGTERM)
        assert train.wait(30) == 143, train.text
        assert not train.left_behind(10.0)
    with Train(config, "--resume") as train:
        assert train.wait() == 0, train.text
    assert weights(train.run_dir) == weights(finished)
    assert told(train.run_dir) == told(finished)


def test_an_update_that_destroys_the_weights_is_not_saved(write_config, tmp_path):
    with Train(write_config(tmp_path, **{"optimizer.lr": 1e3, "optimizer.warmup_steps": 0})) as train:
        assert train.wait() == 1
        assert "has destroyed the weights" in train.text, train.text
    assert checkpoint.latest(train.run_dir / "checkpoints") is None


class Generate(Train):
    command = ("rlzero.cli", "generate")


def test_generate_writes_several_steps_beside_a_run_whose_folder_it_leaves_alone(write_config, tmp_path):
    config = write_config(tmp_path, **{"data.evaluation": "countdown", "data.params": {"count": 64}})
    before = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    before.parent.mkdir(parents=True)
    before.write_text('{"step": 0}\n{"step": 1')  # a line that a run is just writing
    with Generate(config, "--dump", str(tmp_path / "d.jsonl"), "--steps", "2") as command:
        assert command.wait(100) == 0, command.text
        assert "6 groups, 18 completions" in command.text
    assert before.read_text() == '{"step": 0}\n{"step": 1'
    assert list(before.parent.iterdir()) == [before]


def test_rewards_too_large_for_advantages_are_named():
    spec = Reward(fn="./huge.py:f")
    rollouts = [Rollout("a/1", s, (1,), [2], [-1.0], [(0, 1)], "stop", "") for s in (0, 1)]
    group = Group(Prompt("1", "q", (1,), {}), rollouts)
    group.scores = [[Score(1e300, "correct")], [Score(0.0, "wrong")]]
    with pytest.raises(RewardError, match=r"1e\+300 \(./huge.py:f: 1e\+300\)"):
        grade([group], (spec,), Algorithm(), 8)


def test_last_good_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    for step in (1, 2):
        with checkpoint.writing(tmp_path / "checkpoints" / f"step-{step:06d}") as partial:
            (partial / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoints/step-000002/model.safetensors").write_bytes(b"damaged")
    with run_folder.claimed(tmp_path, "last-good") as newest:
        assert newest is not None and newest.name == "step-000001"
    assert (tmp_path / "checkpoints/step-000002.damaged").is_dir()  # nothing is thrown away


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses that any of the processes listens at."""
    found = set()
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


# --- one rollout worker ----------------------------------------------------------------------------------------------


def open_run(config: Path) -> Run:
    return Run(Config.load(config), resume=False)


async def some_open(run: Run, worker: int) -> None:
    """Waits until the worker has requests in hand."""
    async with asyncio.timeout(60):
        while not run.pool.open[worker]:
            await asyncio.sleep(0.005)


def ids(groups: list[Group]) -> list[tuple[str, int]]:
    return [(rollout.prompt_id, rollout.sample) for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_killed_worker_comes_back_with_current_weights_and_answers_everything_once(
    transport, local_ray, write_config, tmp_path
):
    changes = {"rollout.workers": 2, "data.evaluation": None, "evaluation.every": 0, "rollout.transport": transport}
    config = write_config(tmp_path, **changes)

    async def go() -> None:
        async with open_run(config) as run:
            graded = await loop.collect(run, 0)
            samples = loop.to_samples(graded, run.config.algorithm)
            await run.trainer.call("step", loop.minibatches(samples, run.config))
            await run.publish(version=1)
            victim = (await run.pool.workers[1].call("ping", deadline_s=30))["pid"]

            prompts = run.prompts.take(20)
            writing = asyncio.create_task(run.writer.all("1.0", prompts, 3, run.sampling))
            await some_open(run, 1)
            os.kill(victim, signal.SIGKILL)
            groups = await writing

            assert run.pool.restarts == 1
            assert ids(groups) == [(f"1.0/{p.id}", s) for p in prompts for s in range(3)]
            assert all(version == 1 for g in groups for r in g.rollouts for version, _ in r.versions)
            assert all(r.tokens and len(g.scores) == 3 for g in groups for r in g.rollouts)
            answer = await run.pool.workers[1].call("ping", deadline_s=30)
            assert answer["pid"] != victim and answer["version"] == 1
            await run.check_agreement(version=1)  # raises where the new engine holds other weights than the trainer

    asyncio.run(go())


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_worker_killed_while_the_trainer_works_waits_for_the_next_weights(
    transport, local_ray, write_config, tmp_path
):
    """A step is changing the trainer's weights: there is no version to give to the new worker before the step's end."""
    changes = {"staleness": 1, "loss.correction": "tis", "rollout.workers": 2, "rollout.transport": transport}
    config = write_config(tmp_path, **changes, **{"data.evaluation": None, "evaluation.every": 0})

    async def go() -> None:
        async with open_run(config) as run:
            graded = await loop.collect(run, 0)
            batches = loop.minibatches(loop.to_samples(graded, run.config.algorithm), run.config)
            victim = (await run.pool.workers[1].call("ping", deadline_s=30))["pid"]
            await run.make_room()
            writing = asyncio.create_task(run.writer.all("1.0", run.prompts.take(20), 3, run.sampling))
            await some_open(run, 1)
            os.kill(victim, signal.SIGKILL)
            async with asyncio.timeout(60):
                while not run.pool.needs_weights:
                    await asyncio.sleep(0.05)
            await run.trainer.call("step", batches)
            assert run.pool.needs_weights == {1} and run.pool.open[1] and not writing.done()
            await run.publish(version=1)  # raises where an engine then holds other weights than the trainer
            groups = await writing
            assert not run.pool.needs_weights and run.pool.restarts == 1
            late = [r for g in groups[1::2] for r in g.rollouts if 0 not in dict(r.versions)]
            assert late and all(r.versions == [(1, len(r.tokens))] for r in late)

    asyncio.run(go())


def test_a_hung_worker_is_named_within_the_deadline(local_ray, write_config, tmp_path):
    config = write_config(tmp_path, **{"rollout.deadline_s": 4.0, "data.evaluation": None, "evaluation.every": 0})

    async def go() -> float:
        async with open_run(config) as run:
            pid = (await run.pool.workers[0].call("ping", deadline_s=30))["pid"]
            os.kill(pid, signal.SIGSTOP)
            began_s = time.monotonic()
            try:
                with pytest.raises(ClusterError, match="rollout worker 0.*rollout.deadline_s"):
                    await loop.collect(run, 0)
                return time.monotonic() - began_s
            finally:
                os.kill(pid, signal.SIGCONT)

    assert 3.5 < asyncio.run(go()) < 10.0


def test_a_hung_trainer_is_named_within_the_deadline(local_ray, write_config, tmp_path):
    config = write_config(tmp_path, **{"rollout.deadline_s": 4.0, "data.evaluation": None, "evaluation.every": 0})

    async def go() -> float:
        async with open_run(config) as run:
            pid = await run.trainer.call("pid")
            os.kill(pid, signal.SIGSTOP)
            began_s = time.monotonic()
            try:
                with pytest.raises(ClusterError, match="trainer did not answer 'step' within 4 s"):
                    await loop.train(run)
                return time.monotonic() - began_s
            finally:
                os.kill(pid, signal.SIGCONT)

    assert 3.5 < asyncio.run(go()) < 25.0


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_trainer_that_dies_before_it_sends_its_weights_counts_as_a_dead_trainer(
    transport, local_ray, write_config, tmp_path
):
    changes = {"rollout.transport": transport, "data.evaluation": None, "evaluation.every": 0}
    config = write_config(tmp_path, **changes)

    async def go() -> None:
        async with open_run(config) as run:
            trainer, update = psutil.Process(await run.trainer.call("pid")), run.pool.update

            async def killing(updates: list) -> None:
                trainer.kill()
                trainer.wait(10)
                await update(updates)

            run.pool.update = killing
            with pytest.raises(TrainerDied):
                await run.publish(version=1)

    asyncio.run(go())
