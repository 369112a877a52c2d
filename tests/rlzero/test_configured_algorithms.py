"""Each algorithm through the configuration: what the named options do to one training step, against the formulas.

`rlzero train --from-dump` runs the training half of a step on groups made by hand. Log-probabilities come from
transformers' model of the same weights, everything else is written out in float64 below; nothing here calls the
project's losses or advantages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.score import Score
from rlzero import launch
from rlzero.config.rl import Config
from rlzero.data import dump
from rlzero.rl import loop
from rlzero.rl.groups import Group, grade, to_samples
from rollout.engine import Prompt, Rollout
from trainer.trainer import Trainer

BOUND = 2e-4  # the policy computes in float32
MAX_TOKENS = 24
REWARDS = [{"fn": "rlzero.examples.countdown:countdown_reward"}, {"fn": "rewards.format:format_reward", "weight": 0.5}]
PLAIN = {
    "loss.kl_coef": 0, "optimizer.warmup_steps": 0, "data.evaluation": None, "evaluation.every": 0,
    "batch.prompts": 4, "rollout.max_tokens": MAX_TOKENS, "rewards": REWARDS,
}  # fmt: skip


def groups() -> list[Group]:
    """Four questions with three completions each, of 3 to 24 tokens, those of 24 cut at the limit. The first reward is
    0 or 1, the second a share; one checker failed."""
    rng = random.Random(7)
    made = []
    for g in range(4):
        prompt = tuple(rng.randrange(10, 400) for _ in range(5 + g))
        rollouts, scores = [], []
        for s in range(3):
            length = MAX_TOKENS if (g + s) % 4 == 0 else rng.randrange(3, 20)
            tokens = [rng.randrange(10, 400) for _ in range(length)]
            reason = "length" if length == MAX_TOKENS else "stop"
            logprobs = [0.0] * length  # filled in from the policy's, see `written`
            rollouts.append(Rollout(f"0/{g}", s, prompt, tokens, logprobs, [(0, length)], reason, ""))
            failed = (g, s) == (1, 2)
            right = Score(0.0, "error") if failed else Score(float((g + s) % 2), "correct" if (g + s) % 2 else "wrong")
            scores.append([right, Score(rng.random(), "correct")])
        made.append(Group(Prompt(f"0/{g}", "", prompt, {}), rollouts, scores))
    return made


def their_logprobs(folder: Path, made: list[Group]) -> list[np.ndarray]:
    """Of every completion's tokens, in group order, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for rollout in (r for group in made for r in group.rollouts):
        tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        with torch.no_grad():
            rows = model(tokens).logits[0, :-1].double().log_softmax(-1)
        values = rows.gather(1, tokens[0, 1:, None])[:, 0]
        found.append(values[len(rollout.prompt_tokens) - 1 :].numpy())
    return found


@pytest.fixture(scope="module")
def written(tiny_policy, tmp_path_factory) -> tuple[Path, list[Group], list[np.ndarray]]:
    """A dump, its groups, and the policy's log-probabilities. The engine's are off by up to 1.5: some tokens fall
    outside the bounds of every correction."""
    made = groups()
    logprobs = their_logprobs(tiny_policy, made)
    rng = random.Random(11)
    for rollout, values in zip((r for g in made for r in g.rollouts), logprobs, strict=True):
        rollout.logprobs = [float(v) + rng.uniform(-1.5, 0.9) * (rng.random() < 0.5) for v in values]
    path = tmp_path_factory.mktemp("dump") / "groups.jsonl"
    dump.save(path, made)
    return path, made, logprobs


@pytest.fixture
def stepped(written, write_config, tmp_path) -> Callable[..., dict[str, float]]:
    def step(resume: bool = False, **changes: object) -> dict[str, float]:
        return launch.train_from_dump(Config.load(write_config(tmp_path, **{**PLAIN, **changes})), written[0], resume)

    return step


# --- the reference ----------------------------------------------------------------------------------------------------


def rewards_of(made: list[Group]) -> list[list[float | None]]:
    """The weighted sum, None where a checker failed."""
    return [
        [None if s[0].verdict == "error" else s[0].value + 0.5 * s[1].value for s in group.scores] for group in made
    ]


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def deviation(values) -> float:
    values = list(values)
    centre = mean(values)
    return math.sqrt(mean((v - centre) ** 2 for v in values))


def group_advantages(kind: str, rewards: list[list[float | None]]) -> list[float | None]:
    per_group = []
    for group in rewards:
        valid = [r for r in group if r is not None]
        for r in group:
            if r is None:
                per_group.append(None)
            elif kind == "grpo":
                per_group.append((r - mean(valid)) / (deviation(valid) + 1e-6))
            elif kind == "rloo":
                per_group.append((r - mean(valid)) * len(valid) / (len(valid) - 1))
            else:
                per_group.append(r - mean(valid))
    if kind == "reinforce_pp":
        valid = [a for a in per_group if a is not None]
        per_group = [None if a is None else (a - mean(valid)) / (deviation(valid) + 1e-6) for a in per_group]
    return per_group


def expected_loss(parts: list[np.ndarray], aggregation: str = "sequence", constant: int = 1) -> float:
    """The step's loss from the per-token losses of each completion that counts."""
    if aggregation == "token":
        return math.fsum(v for part in parts for v in part) / sum(map(len, parts))
    if aggregation == "constant":
        return math.fsum(v for part in parts for v in part) / (constant * len(parts))
    return mean(mean(part) for part in parts)


def plain(written, kind: str = "grpo", keep: Callable = lambda rollout: True) -> list[np.ndarray]:
    """-A on every token of the completions that count: the on-policy loss, where every ratio is 1."""
    _, made, logprobs = written
    rollouts = [r for group in made for r in group.rollouts]
    values = group_advantages(kind, rewards_of(made))
    return [
        -a * np.ones(len(p)) for a, p, r in zip(values, logprobs, rollouts, strict=True) if a is not None and keep(r)
    ]


# --- advantages, aggregation, masking, shaping ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_advantages_and_aggregation(stepped, written, kind, aggregation):
    found = stepped(**{"algorithm.advantage": kind, "loss.aggregation": aggregation})
    assert found["policy_loss"] == pytest.approx(expected_loss(plain(written, kind), aggregation), abs=BOUND)
    assert found["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_dr_grpo_divides_every_completion_by_one_constant(stepped, written):
    changes = {"loss.aggregation": "constant", "algorithm.advantage": "dr_grpo"}
    expected = expected_loss(plain(written, "dr_grpo"), "constant", 24)
    assert stepped(**changes)["policy_loss"] == pytest.approx(expected, abs=BOUND)


def test_truncated_completions_are_masked_but_stay_in_their_groups_statistics(stepped, written):
    found = stepped(**{"algorithm.mask_truncated": True})
    parts = plain(written, keep=lambda rollout: rollout.finish_reason != "length")
    assert 0 < len(parts) < len(plain(written))
    assert found["policy_loss"] == pytest.approx(expected_loss(parts), abs=BOUND)


def test_overlong_completions_lose_reward_before_the_statistics(stepped, written):
    found = stepped(**{"algorithm.overlong": [10, 0.7]})
    _, made, logprobs = written
    rewards = [
        [None if r is None else r - 0.7 * max(0, len(o.tokens) - 14) / 10 for r, o in zip(rs, g.rollouts, strict=True)]
        for rs, g in zip(rewards_of(made), made, strict=True)
    ]
    parts = [
        -a * np.ones(len(p)) for a, p in zip(group_advantages("grpo", rewards), logprobs, strict=True) if a is not None
    ]
    assert found["policy_loss"] == pytest.approx(expected_loss(parts), abs=BOUND)


# --- the engine's mismatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("correction", ["tis", "icepop"])
def test_corrections_at_every_level(stepped, written, correction, level):
    found = stepped(**{"loss.correction": correction, "loss.correction_level": level})
    _, made, logprobs = written
    rollouts = [r for group in made for r in group.rollouts]
    parts, outside = [], []
    for a, old, rollout in zip(group_advantages("grpo", rewards_of(made)), logprobs, rollouts, strict=True):
        if a is None:
            continue
        gap = old - np.array(rollout.logprobs)
        if level != "token":
            gap = np.full_like(gap, gap.sum() if level == "sequence" else gap.mean())
        ratio = np.exp(gap)
        low, high = (0.0, 2.0) if correction == "tis" else (0.5, 5.0)
        out = (ratio < low) | (ratio > high)
        weight = np.minimum(ratio, high) if correction == "tis" else np.where(out, 0.0, ratio)
        parts.append(-a * weight)
        outside.append(out)
    if level != "geometric":
        assert np.concatenate(outside).any()  # else the bounds were not tried
    assert found["policy_loss"] == pytest.approx(expected_loss(parts), abs=5 * BOUND)
    assert found["correction_fraction"] == pytest.approx(np.concatenate(outside).mean(), abs=1e-6)


# --- policy losses, in the second minibatch, where the policy is not the old one any more -----------------------------


@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
def test_policy_losses_with_their_own_clips(stepped, written, write_config, tmp_path, kind):
    low, high = (0.02, 0.05) if kind != "gspo" else (0.001, 0.002)
    changes = {"loss.policy_loss": kind, "loss.clip_low": low, "loss.clip_high": high, "batch.minibatches": 2}
    found = stepped(**changes, **{"optimizer.lr": 2e-3})
    new = _after_the_first_minibatch(written, write_config, tmp_path / "half", {**changes, "optimizer.lr": 2e-3})
    _, made, logprobs = written
    values = group_advantages("grpo", rewards_of(made))
    halves: list[list[np.ndarray]] = [[], []]
    clipped = []
    for i, (a, old) in enumerate(zip(values, logprobs, strict=True)):
        if a is None:
            continue
        now = old if i < 6 else new[i]
        log_ratio = now - old if kind != "gspo" else np.full_like(old, (now - old).mean())
        ratio = np.exp(log_ratio)
        bounded = np.clip(ratio, 1 - low, 1 + high)
        if kind == "cispo":
            halves[i >= 6].append(-bounded * a * now)
            clipped.append(bounded != ratio)
        else:
            halves[i >= 6].append(-np.minimum(ratio * a, bounded * a))
            clipped.append(bounded * a < ratio * a)
    share = np.concatenate(clipped).mean()
    assert 0.02 < share < 0.5  # the bounds act on some
    assert found["clip_fraction"] == pytest.approx(share, abs=0.01)
    assert found["policy_loss"] == pytest.approx(mean(map(expected_loss, halves)), abs=5 * BOUND)


def _after_the_first_minibatch(written, write_config, folder: Path, changes: dict) -> list[np.ndarray]:
    """transformers' log-probabilities of all completions after an update on the first half of the groups."""
    config = Config.load(write_config(folder, **{**PLAIN, **changes}))
    _trained(config, written[1]).policy.save(folder / "policy")
    return their_logprobs(folder / "policy", written[1])


def _trained(config: Config, made: list[Group]) -> Trainer:
    """A trainer after one update on the first minibatch."""
    trainer = Trainer(config.policy, config.optimizer, config.loss, seed=config.seed, threads=1, device="cpu")
    samples = to_samples(grade(made, config.rewards, config.algorithm, MAX_TOKENS), config.algorithm)
    trainer.step(loop.minibatches(samples, config)[:1])
    return trainer


# --- KL to the reference, entropy -------------------------------------------------------------------------------------


ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
}


@pytest.fixture
def drifted(written, write_config, tmp_path) -> list[np.ndarray]:
    """A run to resume: the policy of its checkpoint has moved, the reference is still the base. Returns the policy's
    log-probabilities."""
    config = Config.load(write_config(tmp_path, **{**PLAIN, "optimizer.lr": 2e-3, "loss.kl_coef": 0.01}))
    folder = config.run_dir / "checkpoints" / "step-000001"
    _trained(config, written[1]).save(folder)
    return their_logprobs(folder, written[1])


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_kl_in_loss_and_in_reward(stepped, written, drifted, estimator, place):
    changes = {"loss.kl_coef": 0.5, "loss.kl_estimator": estimator, "loss.kl_in": place}
    found = stepped(resume=True, **changes, **{"algorithm.reference_refresh_steps": 0})
    _, made, reference = written
    parts, kl = [], []
    for a, new, base in zip(group_advantages("grpo", rewards_of(made)), drifted, reference, strict=True):
        if a is None:
            continue
        penalty = ESTIMATORS[estimator](new - base)
        to_go = np.cumsum(penalty[::-1])[::-1]
        parts.append(-a + 0.5 * to_go if place == "reward" else -a * np.ones(len(new)))
        kl.append(ESTIMATORS["k3"](new - base))
    assert found["kl_reference"] == pytest.approx(np.concatenate(kl).mean(), rel=0.02)
    assert found["policy_loss"] == pytest.approx(expected_loss(parts), abs=5 * BOUND)
    # the penalty of the loss is not part of policy_loss: it shows in the gradient
    without = stepped(resume=True, **{"loss.kl_coef": 0})
    assert found["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)


def test_an_entropy_bonus_changes_the_gradient_and_nothing_else(stepped):
    plain_step, bonus = stepped(), stepped(**{"loss.entropy_coef": 5.0})
    assert bonus["policy_loss"] == plain_step["policy_loss"] and bonus["entropy"] == plain_step["entropy"]
    assert bonus["grad_norm"] != pytest.approx(plain_step["grad_norm"], rel=1e-3)
