"""A question with its graded completions, and the way from there to what the trainer sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from rewards.load import RewardError
from rewards.score import Score
from rlzero.config.rl import Algorithm, Reward
from rlzero.rl import advantages
from rollout.engine import Prompt, Rollout
from trainer.packing import Sample

LARGEST_REWARD = 1e18  # its square is still a number in FP32


@dataclass
class Group:
    """One prompt and its completions in sample order. `scores[i][j]` is what reward j said of completion i; None
    means that it does not apply to the row."""

    prompt: Prompt
    rollouts: list[Rollout]
    scores: list[list[Score | None]] = field(default_factory=list)

    def rewards(self, specs: tuple[Reward, ...]) -> Float[np.ndarray, " samples"]:
        """Weighted sum over the rewards that apply; NaN where a checker failed, so that nobody mistakes it for 0."""
        return np.array([weighted(scores, specs) for scores in self.scores])


def weighted(scores: list[Score | None], specs: tuple[Reward, ...]) -> float:
    """The reward of one completion; NaN if any checker had an infrastructure error or none applied."""
    applying = [(score, spec) for score, spec in zip(scores, specs, strict=True) if score is not None]
    if not applying or any(score.verdict == "error" for score, _ in applying):
        return float("nan")
    return sum(spec.weight * score.value for score, spec in applying)


@dataclass
class Graded:
    """The groups of a step as arrays: `rewards` [groups, samples] with 0 where `valid` is False; `degenerate` [groups]
    marks groups whose checkers gave all valid completions the same, whatever their lengths added."""

    groups: list[Group]
    rewards: Float[np.ndarray, "groups samples"]
    valid: Bool[np.ndarray, "groups samples"]
    degenerate: Bool[np.ndarray, " groups"]

    def select(self, keep: Bool[np.ndarray, " groups"]) -> Graded:
        kept = [group for group, k in zip(self.groups, keep, strict=True) if k]
        return Graded(kept, self.rewards[keep], self.valid[keep], self.degenerate[keep])

    def __add__(self, other: Graded) -> Graded:
        return Graded(
            self.groups + other.groups,
            np.concatenate([self.rewards, other.rewards]),
            np.concatenate([self.valid, other.valid]),
            np.concatenate([self.degenerate, other.degenerate]),
        )


def grade(groups: list[Group], specs: tuple[Reward, ...], algorithm: Algorithm, max_tokens: int) -> Graded:
    """Rewards of every completion, overlong punishment included (DAPO, arXiv 2503.14476, eq. 13)."""
    raw = np.stack([group.rewards(specs) for group in groups])  # [groups, samples]
    valid = ~np.isnan(raw)
    if np.abs(raw[valid]).max(initial=0.0) > LARGEST_REWARD:
        g, s = np.argwhere(valid & (np.abs(raw) > LARGEST_REWARD))[0]
        scored = zip(specs, groups[g].scores[s], strict=True)
        said = ", ".join(f"{spec.fn}: {score.value:g}" for spec, score in scored if score is not None)
        raise RewardError(
            f"a reward of {raw[g, s]:g} ({said}): its square, which the advantages need, is no finite number; rewards "
            f"have to stay within {LARGEST_REWARD:g}, best near 1"
        )
    rewards = np.where(valid, raw, 0.0)
    degenerate = advantages.zero_variance(rewards, valid)
    buffer_tokens, penalty = algorithm.overlong
    if buffer_tokens:
        lengths = np.array([[len(r.tokens) for r in group.rollouts] for group in groups])
        rewards += valid * advantages.overlong_penalty(lengths, max_tokens, buffer_tokens, penalty)
    return Graded(groups, rewards, valid, degenerate)


def to_samples(graded: Graded, algorithm: Algorithm) -> list[Sample]:
    """What the trainer learns from, in group order: every completion with its advantage; those whose checker failed,
    and truncated ones where the config says so, are masked."""
    values = advantages.ADVANTAGES[algorithm.advantage](graded.rewards, graded.valid)
    samples = []
    for g, group in enumerate(graded.groups):
        for s, rollout in enumerate(group.rollouts):
            truncated = rollout.finish_reason == "length"
            samples.append(
                Sample(
                    prompt_tokens=rollout.prompt_tokens,
                    tokens=rollout.tokens,
                    advantage=float(values[g, s]),
                    behaviour_logprobs=rollout.logprobs,
                    versions=rollout.versions,
                    masked=not graded.valid[g, s] or (algorithm.mask_truncated and truncated),
                    routed_experts=rollout.routed_experts,
                )
            )
    return samples
