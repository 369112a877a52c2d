"""A penalty for saying the same again: the loop that a policy falls into when length alone pays."""

from __future__ import annotations

import re

from rewards.score import Score

_PIECE = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+|[^\w\s]")
MAX_PIECES = 200_000


def repeated_share(text: str, n: int) -> float:
    """The share of n-grams of words (characters in scripts without spaces) that have occurred before, 0 to 1."""
    pieces = [match.group().lower() for match in _PIECE.finditer(text[: 8 * MAX_PIECES])][:MAX_PIECES]
    total = len(pieces) - n + 1
    if total <= 0:
        return 0.0
    distinct = len({hash(tuple(pieces[at : at + n])) for at in range(total)})
    return 1.0 - distinct / total


def repetition_reward(completion: str, n: int = 20, allowed: float = 0.1, penalty: float = 1.0) -> Score:
    """0 while at most `allowed` of the n-grams are repeated, then falling linearly to -`penalty` when all are.

    N-gram repetition penalty (arXiv 2502.03373, section 4.2, uses n = 40 on tokens). Raises ValueError unless n >= 1
    and 0 <= allowed < 1.
    """
    if n < 1 or not 0 <= allowed < 1:
        raise ValueError(f"n is {n} and allowed {allowed}; expected n >= 1 and 0 <= allowed < 1")
    share = repeated_share(completion, n)
    value = -penalty * max(0.0, share - allowed) / (1.0 - allowed)
    return Score(value, "correct" if value == 0 else "wrong", {"repeated_share": share})
