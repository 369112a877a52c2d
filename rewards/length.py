"""Length shaping: rewards that make a policy say the same with fewer words, or at least stop in time.

Lengths are counted in characters, because a reward sees text; the loop's own overlong penalty counts tokens.
"""

from __future__ import annotations

from typing import Any

from rewards.load import load_reward
from rewards.score import Score


def overlong_reward(completion: str, limit_characters: int, buffer_characters: int) -> Score:
    """0 up to `limit - buffer`, then falling linearly to -1 at `limit` and beyond.

    Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), on characters. Raises ValueError unless
    0 < buffer <= limit.
    """
    if not 0 < buffer_characters <= limit_characters:
        raise ValueError(
            f"buffer_characters is {buffer_characters}, limit_characters {limit_characters}; expected 0 < buffer"
            f" <= limit"
        )
    over = len(completion) - (limit_characters - buffer_characters)
    value = -min(1.0, max(0.0, over / buffer_characters))
    return Score(value, "correct" if value == 0 else "wrong", {"characters": float(len(completion))})


def length_reward(completions: list[str], correct: str = "", **row: Any) -> list[Score | None]:
    """Within a group, 0.5 for the shortest completion down to -0.5 for the longest.

    Length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): with `correct`, the address of a reward for one
    completion (`rewards.math:math_reward`), a completion that this reward does not find correct gets at most 0, so
    nothing is won by short wrong answers. All of one length: 0. Where `correct` does not apply or fails, None.
    """
    lengths = [len(text) for text in completions]
    shortest, longest = min(lengths), max(lengths)
    judge = load_reward(correct) if correct else None
    scores: list[Score | None] = []
    for text, length in zip(completions, lengths, strict=True):
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        if judge is not None:
            verdict = judge.one(text, row)
            if verdict is None or verdict.verdict == "error":
                scores.append(verdict)
                continue
            if verdict.verdict != "correct":
                value = min(0.0, value)
        scores.append(Score(value, "correct" if value >= 0 else "wrong", {"characters": float(length)}))
    return scores
