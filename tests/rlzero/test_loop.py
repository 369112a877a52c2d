"""The GRPO loop as a whole: real Ray, real torch engine, real checkers, a tiny V3 policy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.load import RewardError
from rlzero import launch
from rlzero.config.rl import Config
from rlzero.report.log import read_lines
from rlzero.rl import loop
from rlzero.rl.groups import Graded, to_samples
from rlzero.rl.run import Run, RunError
from trainer.checkpoint import checkpoint, hf

pytestmark = pytest.mark.timeout(170)


class RecordedRun(Run):
    """A run that keeps what every wave wrote."""

    def __init__(self, config: Config):
        super().__init__(config, resume=False)
        self.waves: list[tuple[int, Graded]] = []

    def count(self, step: int, graded: Graded) -> None:
        self.waves.append((step, graded))
        super().count(step, graded)


def inside(config: Path, work: Callable[[RecordedRun], Awaitable[Any]]) -> Any:
    """What `work(run)` returns inside a run of `config`."""

    async def go() -> Any:
        async with RecordedRun(Config.load(config)) as run:
            return await work(run)

    return asyncio.run(go())


# --- an uninterrupted on-policy run, started by the command ----------------------------------------------------------


def test_every_step_writes_one_line_of_finite_metrics(finished):
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    for line in lines:
        assert line["completions"] == 9 and line["policy_version"] == line["step"] + 1
        for name in (
            "reward_mean",
            "length_mean",
            "entropy",
            "policy_loss",
            "grad_norm",
            "time_step_s",
            "kl_reference",
        ):
            assert np.isfinite(line[name]), name
        assert 0 < line["length_mean"] <= 24 and line["grad_norm"] > 0


def test_on_policy_the_engine_agrees_with_the_trainer_and_every_ratio_is_one(finished):
    for line in read_lines(finished / "metrics.jsonl"):
        assert 0 <= line["gap"] < 1e-4
        assert 0 <= line["sync_gap"] < 1e-4
        assert line["ratio"] == 1.0 and line["clip_fraction"] == 0.0


def test_evaluations_stand_before_between_and_after_the_steps(finished):
    lines = read_lines(finished / "evals.jsonl")
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert all(0 <= line["pass_at_1"] <= 1 for line in lines)


def test_transformers_loads_the_checkpoint_and_agrees_on_its_logits(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint.latest(finished / "checkpoints")
    assert folder.name == "step-000008"
    tokens = AutoTokenizer.from_pretrained(folder)("Make 24 from 4, 6, 8.", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = hf.load_folder(folder, torch.float32, torch.device("cpu"))
    count = tokens.shape[1]
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        hidden = ours(tokens[0], torch.arange(count), torch.tensor([0, count])).hidden
        found = ours.logits(hidden)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_weights_of_every_step_differ(finished):
    weights = [f.read_bytes() for f in sorted((finished / "checkpoints").glob("step-*/model.safetensors"))]
    assert len(weights) == len(set(weights)) == 8


def test_the_reference_is_refreshed_on_schedule(finished):
    """Every 3 steps it becomes the policy: the KL to it starts from 0 again."""
    kl = [line["kl_reference"] for line in read_lines(finished / "metrics.jsonl")]
    assert [step for step, value in enumerate(kl) if value == 0] == [0, 3, 6]
    assert all(value > 0 for step, value in enumerate(kl) if step not in (0, 3, 6))


def test_a_step_in_two_halves_is_the_same_step(local_ray, finished, write_config, tmp_path):
    """`generate --dump`, then `train --from-dump`: what the uninterrupted run did in its first step, to the bit."""
    config = Config.load(write_config(tmp_path))
    groups = launch.generate(config, tmp_path / "groups.jsonl", resume=False)
    assert len(groups) == 3 and all(len(group.scores) == 3 for group in groups)
    found = launch.train_from_dump(config, tmp_path / "groups.jsonl", resume=False)
    (first, *_) = read_lines(finished / "metrics.jsonl")
    for name in ("policy_loss", "grad_norm", "entropy", "gap", "kl_reference"):
        assert found[name] == first[name], name


def test_who_starts_a_run_reads_its_own_lines_and_nobody_elses(finished):
    lines = (finished.parents[1] / "output.txt").read_text().splitlines()
    assert [line.split(" ")[1] for line in lines if line.startswith("step ")] == [f"{n}/8" for n in range(1, 9)]
    events = ("engine: ", "placement: ", "evaluation at step ", "step ")
    others = [line for line in lines if not line.startswith(events)]
    assert [line.split(" ")[0] for line in others] == ["pass@1", "report:"], others


# --- inside a run ----------------------------------------------------------------------------------------------------


def test_with_staleness_one_tokens_lag_by_at_most_one_version(local_ray, write_config, tmp_path):
    async def work(run: RecordedRun) -> list[tuple[int, Graded]]:
        await loop.train(run)
        return run.waves

    changes = {"steps": 5, "staleness": 1, "loss.correction": "tis", "evaluation.every": 0}
    waves = inside(write_config(tmp_path, **changes), work)
    assert [step for step, _ in waves] == [0, 1, 2, 3, 4]
    lags = set()
    for step, graded in waves:
        for group in graded.groups:
            for rollout in group.rollouts:
                assert sum(count for _, count in rollout.versions) == len(rollout.tokens)
                lags |= {step - version for version, _ in rollout.versions}
    assert lags <= {0, 1} and 1 in lags  # 1 in lags: it did write ahead
    lines = read_lines(tmp_path / "runs/tiny/metrics.jsonl")
    assert all(np.isfinite(line["policy_loss"]) for line in lines) and len(lines) == 5


def test_dynamic_sampling_refills_groups_that_teach_nothing(local_ray, write_config, tmp_path):
    changes = {"batch.prompts": 4, "batch.group_size": 2, "algorithm.max_refills": 30, "rollout.max_tokens": 8}
    changes |= {"data.evaluation": None, "evaluation.every": 0}

    async def work(run: RecordedRun) -> tuple[Graded, list, int]:
        return await loop.collect(run, 0), run.waves, run.prompts.position

    taken, waves, position = inside(write_config(tmp_path, reward="coin", **changes), work)
    assert len(taken.groups) == 4
    assert all(len(set(rewards)) > 1 for rewards in taken.rewards.tolist())
    written = [group for _, wave in waves for group in wave.groups]
    useful = [g.prompt.id for g in written if len({sum(s.value for s in scores) for scores in g.scores}) > 1]
    assert len(written) > 4, "every group was useful at once: the test shows nothing"
    assert [g.prompt.id for g in taken.groups] == useful
    assert len({g.prompt.id for g in written}) == len(written) == position


def test_completions_whose_checker_fails_are_masked_and_counted(local_ray, write_config, tmp_path):
    config = write_config(
        tmp_path, reward="picky", max_reward_error_rate=1.0, **{"data.evaluation": None, "evaluation.every": 0}
    )

    async def work(run: RecordedRun) -> tuple[Graded, dict]:
        graded = await loop.collect(run, 0)
        return graded, run._written[0].metrics(run.config.rewards)

    graded, metrics = inside(config, work)
    failed = [any(s.verdict == "error" for s in scores) for group in graded.groups for scores in group.scores]
    assert 0 < sum(failed) < 9
    assert metrics["reward_errors"] == sum(failed)
    samples = to_samples(graded, Config.load(config).algorithm)
    assert [sample.masked for sample in samples] == failed
    assert all(sample.advantage == 0 for sample, bad in zip(samples, failed, strict=True) if bad)
    mean = np.mean([sum(w * s.value for w, s in zip((1, 0.5), scores, strict=True))
                    for group in graded.groups for scores in group.scores
                    if all(s.verdict != "error" for s in scores)])  # fmt: skip
    assert metrics["reward_mean"] == pytest.approx(mean)


def test_a_run_whose_reward_keeps_failing_stops_with_the_traceback(local_ray, write_config, tmp_path):
    changes = {"batch.prompts": 8, "batch.group_size": 8, "rollout.max_tokens": 2, "data.evaluation": None}
    config = write_config(tmp_path, reward="broken", **changes, **{"evaluation.every": 0})
    with pytest.raises(RewardError, match="more than 5%") as caught:
        inside(config, loop.train)
    assert "ArithmeticError: every completion is beyond me" in str(caught.value)
    assert "made_for_tests.py" in str(caught.value)
    assert not (tmp_path / "runs/tiny/checkpoints").exists()


def test_a_small_run_whose_reward_always_fails_stops_with_the_traceback(local_ray, write_config, tmp_path):
    changes = {"batch.prompts": 1, "batch.group_size": 3, "batch.minibatches": 1, "data.evaluation": None}
    config = write_config(tmp_path, reward="broken", max_reward_error_rate=0.05, **changes, **{"evaluation.every": 0})
    with pytest.raises(RunError, match="step 0: all 3 completions ended in a checker's error: .*broken") as caught:
        inside(config, loop.train)
    assert "ArithmeticError: every completion is beyond me" in str(caught.value)
