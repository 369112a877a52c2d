"""The demo's rewards dealt to the wrong completions: the control that must not learn."""

from __future__ import annotations

import hashlib
import random

from rewards.format import format_reward
from rewards.score import Score
from rlzero.examples.countdown.reward import countdown_reward


def _shuffled(scores: list[Score], completions: list[str]) -> list[Score]:
    key = hashlib.sha256("\0".join(completions).encode()).hexdigest()
    random.Random(key).shuffle(scores)
    return scores


def countdown(completions: list[str], numbers: list[int], target: int) -> list[Score]:
    """Each completion gets the Countdown score of another one of its group."""
    return _shuffled([countdown_reward(c, numbers=numbers, target=target) for c in completions], completions)


def tags(completions: list[str]) -> list[Score]:
    """Each completion gets the format score of another one of its group."""
    return _shuffled([format_reward(c) for c in completions], completions)
