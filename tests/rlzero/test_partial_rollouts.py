"""Partial rollouts and updates in flight, through the real loop: real Ray, real torch engine, a tiny V3 policy."""

from __future__ import annotations

import asyncio
import json
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rlzero.config.rl import Config
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl import rollouts as writer
from rlzero.rl import run as run_module
from rollout.engine import Request, Rollout
from rollout.torch.engine import TorchEngine
from trainer.checkpoint.folder import FolderReader

from .conftest import Train
from .recorded_run import RecordedRun, SlowCluster

pytestmark = pytest.mark.timeout(500)

# Completions of very different lengths, of which the engine writes four at a time: when the first two groups of a step
# are complete, others are half written and some not begun. The expanded cache takes the native kernels, whose logits
# have the same bits in every batch.
STEPS = 8
SHORT_STEPS = {
    "steps": STEPS, "batch.prompts": 2, "batch.group_size": 3, "rollout.max_tokens": 60, "rollout.stop": ["y"],
    "rollout.engine_args": {"max_batch": 4, "cache": "expanded"}, "loss.correction": "tis", "data.evaluation": None,
    "evaluation.every": 0,
}  # fmt: skip


def train(config: Path) -> RecordedRun:
    """The run after its last step, its processes gone."""

    async def go() -> RecordedRun:
        async with RecordedRun(Config.load(config)) as run:
            await loop.train(run)
            return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Cluster", SlowCluster)
        return asyncio.run(go())


def rollouts(run: RecordedRun) -> list[tuple[int, Rollout]]:
    """(step that trained it, completion)"""
    return [(step, r) for step, graded in run.trained.items() for group in graded.groups for r in group.rollouts]


def policy(run: RecordedRun, version: int) -> Path:
    """The weights of a version, as the trainer saved them."""
    return run.dir / "checkpoints" / f"step-{version:06d}" if version else Path(run.config.policy.path)


@pytest.fixture(scope="module")
def carried(local_ray, write_config, tmp_path_factory) -> RecordedRun:
    """A synchronous run that opens two groups for each one it needs."""
    return train(write_config(tmp_path_factory.mktemp("carried"), **SHORT_STEPS, **{"rollout.oversample": 2.0}))


def test_every_opened_group_is_trained_once_or_still_open(carried):
    """The long ones as well: no prompt is lost and none comes twice."""
    trained = [group.prompt.id for graded in carried.trained.values() for group in graded.groups]
    assert len(trained) == STEPS * 2 and len(set(trained)) == len(trained)
    assert sorted(trained + carried.unused()) == sorted(carried.taken())
    assert 0 < len(carried.unused()) <= 2  # of the last step


def test_completions_are_carried_over_and_their_tokens_remember_their_version(carried):
    found = rollouts(carried)
    several = [r for _, r in found if len(r.versions) > 1]
    assert several, "no completion was interrupted: the test shows nothing"
    for step, r in found:
        versions = [version for version, _ in r.versions]
        assert versions == sorted(set(versions)) and versions[-1] <= step
        assert sum(count for _, count in r.versions) == len(r.tokens) == len(r.logprobs)
        assert r.finish_reason in ("stop", "length")


def test_every_segment_has_the_logprobs_of_the_policy_that_sampled_it(carried):
    """Of the weights that the trainer saved, to rounding; those of another version are far off."""

    @cache
    def engine(version: int) -> TorchEngine:
        return TorchEngine(policy(carried, version))

    own, other = [], []
    for _, r in rollouts(carried):
        if len(r.versions) == 1:
            continue
        start = 0
        for version, count in r.versions:
            for name, gaps in ((version, own), (r.versions[0][0] if start else r.versions[1][0], other)):
                scores = engine(name).score([[*r.prompt_tokens, *r.tokens]])[0][len(r.prompt_tokens) :]
                gaps.append(np.abs(scores[start : start + count] - np.array(r.logprobs[start : start + count])).max())
            start += count
    assert max(own) < 1e-4 < np.median(other)


def test_long_completions_are_not_starved(carried):
    """What a run that opens more groups trains on is as long as what was opened: all of it but the last open ones."""
    config = carried.config
    lengths = [len(r.tokens) for _, r in rollouts(carried)]
    assert max(lengths) == config.rollout.max_tokens  # the longest possible are among them
    late = [step - r.versions[0][0] for step, r in rollouts(carried)]
    long = [lag for lag, length in zip(late, lengths, strict=True) if length == config.rollout.max_tokens]
    assert max(late) <= writer.MOST_CARRIED and max(long) >= 1


def test_metrics_tell_staleness_partial_groups_and_interrupted_tokens(carried):
    lines = read_lines(carried.dir / "metrics.jsonl")
    for line in lines:
        step = line["step"]
        segments = [(step - v, n) for at, r in rollouts(carried) if at == step for v, n in r.versions]
        tokens = sum(n for _, n in segments)
        assert line["staleness_max"] == max(behind for behind, _ in segments)
        assert line["staleness_mean"] == pytest.approx(sum(behind * n for behind, n in segments) / tokens)
        assert line["off_policy_share"] == pytest.approx(sum(n for behind, n in segments if behind) / tokens)
        assert sum(value for name, value in line.items() if name.startswith("staleness/")) == pytest.approx(1)
        assert line["partial_groups"] == 2 and line["completions"] == 6
    assert lines[0]["staleness_max"] == 0 and any(line["off_policy_share"] > 0 for line in lines)
    assert any(line["interrupted_tokens"] > 0 for line in lines)


def test_a_group_that_was_carried_long_enough_is_waited_for(local_ray, write_config, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MOST_CARRIED", 1)
    run = train(write_config(tmp_path, **SHORT_STEPS | {"rollout.oversample": 1.5, "steps": 6}))
    lags = [step - r.versions[0][0] for step, r in rollouts(run)]
    assert max(lags) == 1


def test_refills_take_carried_groups_and_evaluations_run_beside_them(local_ray, write_config, tmp_path):
    """With dynamic sampling a step drops groups and needs others: none is lost or comes twice, and no evaluation is
    stopped where the step's unfinished groups are."""
    changes = {"steps": 4, "rollout.oversample": 1.5, "algorithm.max_refills": 30, "batch.group_size": 2}
    changes |= {"data.evaluation": "countdown", "evaluation.every": 1, "evaluation.prompts": 3, "staleness": 1}
    run = train(write_config(tmp_path, reward="coin", **SHORT_STEPS | changes))
    assert [len(graded.groups) for graded in run.trained.values()] == [2] * 4
    assert not any(graded.degenerate.any() for graded in run.trained.values())
    assert len(run.written) > 4 * 2, "no group was dropped: the test shows nothing"
    assert sorted(run.written + run.unused()) == sorted(run.taken()) and len(set(run.taken())) == len(run.taken())
    assert [line["step"] for line in read_lines(run.dir / "evals.jsonl")] == [0, 1, 2, 3, 4]


# --- updates in flight -----------------------------------------------------------------------------------------------


def replay(run: RecordedRun, written: Rollout) -> Rollout:
    """`written` again, in an engine of this process that is given each version after the tokens of the one before."""
    (first, _), *_ = written.versions
    engine = TorchEngine(run.config.policy.path, cache="expanded")
    engine.update(FolderReader(policy(run, first)), first)
    engine.submit([Request(written.prompt_id, written.sample, written.prompt_tokens, run.sampling)])
    done = 1  # the first step reads the prompt, samples a token, and then another
    for (_, count), (following, _) in zip(written.versions, written.versions[1:], strict=False):
        for _ in range(count - done):
            assert engine.completed(timeout_s=0.0) == []
        engine.update(FolderReader(policy(run, following)), following)
        done = 0
    (again,) = engine.completed()
    return again


def test_running_requests_go_on_with_new_weights_and_their_logprobs_are_those_of_the_mixture(
    local_ray, write_config, tmp_path
):
    """With staleness engines are updated while they write. A completion of several versions, written again from the
    weights that the trainer saved, each put in place where the run did it, has the same bits."""
    changes = SHORT_STEPS | {"staleness": 1, "rollout.oversample": 1.5, "rollout.stop": []}
    run = train(write_config(tmp_path, **changes))
    mixed = [r for _, r in rollouts(run) if len(r.versions) > 1]
    assert mixed, "no update met a running request: the test shows nothing"
    for written in mixed[:6]:
        again = replay(run, written)
        assert (again.versions, again.tokens, again.logprobs) == (written.versions, written.tokens, written.logprobs)
    trained = [group.prompt.id for graded in run.trained.values() for group in graded.groups]
    assert sorted(trained + run.unused()) == sorted(run.taken())


# --- kills -----------------------------------------------------------------------------------------------------------


class TrainRecorded(Train):
    command = ("tests.rlzero.recorded_run",)


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_kills_neither_lose_a_carried_prompt_nor_train_it_twice(write_config, tmp_path, staleness):
    config = write_config(tmp_path, **SHORT_STEPS | {"rollout.oversample": 2.0, "staleness": staleness})
    rng = random.Random(7)
    for step in (1, 4):
        with TrainRecorded(config) as run:
            run.wait_for_step(step)
            time.sleep(rng.uniform(0, 0.3))
            run.family()
            assert run.process.poll() is None, run.text
            run.kill()
    with TrainRecorded(config) as run:
        assert run.wait() == 0, run.text
        assert "ActorDied" not in run.text  # nobody is told of the engines that the run ends while they write
    lines = [json.loads(line) for line in (run.run_dir / "trained.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["prompts"] for line in lines}
    trained = [prompt for step in range(STEPS) for prompt in by_step[step]]
    left = json.loads((run.run_dir / "unused.json").read_text())
    assert len(lines) >= STEPS and len(set(trained)) == len(trained) == STEPS * 2
    assert sorted(trained + left["unused"]) == sorted(left["taken"])
