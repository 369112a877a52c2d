"""Checkers for what a model wrote: mathematics, code, Countdown, format, language. Usable alone: no model, no Ray.

    from rewards import math_reward
    math_reward(r"So it is \\boxed{\\frac{1}{2}}.", answer="0.5").value    # 1.0

docs/rewards.md tells how to write, test and run one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rewards.load import RewardError, RewardSpec, load_reward
from rewards.score import Score

# Imported when first asked for, so that one checker does not pay for the others.
_WHERE = {
    "math_reward": "rewards.math",
    "countdown_reward": "rlzero.examples.countdown.reward",
    "format_reward": "rewards.format",
    "code_reward": "rewards.code",
    "language_reward": "rewards.language",
    "length_reward": "rewards.length",
    "overlong_reward": "rewards.length",
    "repetition_reward": "rewards.repetition",
    "rubric_reward": "rewards.judge",
    "pairwise_reward": "rewards.judge",
    "preference_reward": "rewards.preference",
    "RewardRunner": "rewards.workers.runner",
    "score_file": "rewards.score_file",
}
__all__ = ["RewardError", "RewardSpec", "Score", "load_reward", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
