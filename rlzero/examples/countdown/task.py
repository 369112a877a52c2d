"""Countdown: reach a target from given numbers with + - * /, each number used exactly once.

Instances are split by a hash of their *multiset of numbers*: no instance of one split shares its numbers with an
instance of another, so neither a prompt nor an expression that solves it can cross over. The split `base` is what
the demo's base model may have met; `train` is for reinforcement learning, `held_out` for evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

Split = Literal["base", "train", "held_out"]
Numbers = tuple[int, ...]

SIZES, LARGEST_OF_SIZE = (3, 4), (20, 10)
LARGEST = 199  # no intermediate result passes it: instances stay within two digits and a bit


@dataclass(frozen=True)
class Task:
    numbers: Numbers  # ascending
    target: int

    @property
    def question(self) -> str:
        return f"Make {self.target} from {', '.join(map(str, self.numbers))}."

    @property
    def row(self) -> dict:
        return {"prompt": self.question, "numbers": list(self.numbers), "target": self.target}


@dataclass(frozen=True)
class Move:
    """One operation on two of the numbers at hand: `left op right = result`, and what is then left."""

    left: int
    op: str
    right: int
    result: int
    rest: Numbers  # ascending


@lru_cache(maxsize=1 << 16)
def split_of(numbers: Numbers) -> Split:
    """70 % of the multisets are `base`, 20 % `train`, 10 % `held_out`."""
    key = ",".join(map(str, sorted(numbers))).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 10
    return "base" if bucket < 7 else "train" if bucket < 9 else "held_out"


@lru_cache(maxsize=1 << 16)
def moves(numbers: Numbers) -> tuple[Move, ...]:
    """Every operation on two of `numbers` whose result is a whole number from 1 to LARGEST; equal ones once."""
    found: dict[tuple, Move] = {}
    for i, j in combinations(range(len(numbers)), 2):
        big, small = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        options = [("+", big + small), ("*", big * small), ("-", big - small)]
        if small > 1 and big % small == 0:
            options.append(("/", big // small))
        for op, result in options:
            if 1 <= result <= LARGEST:
                found.setdefault((big, op, small), Move(big, op, small, result, tuple(sorted((result, *rest)))))
    return tuple(found.values())


@lru_cache(maxsize=1 << 16)
def reachable(numbers: Numbers) -> frozenset[int]:
    """Every target that some order of moves reaches with all the numbers."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(reachable(move.rest) for move in moves(numbers)))


def tasks(
    split: Split,
    seed: int,
    sizes: tuple[int, ...] = SIZES,
    largest: tuple[int, ...] = LARGEST_OF_SIZE,
    targets: tuple[int, int] = (10, 50),
) -> Iterator[Task]:
    """An endless, deterministic stream of solvable instances of `split`.

    `sizes[i]` numbers are drawn from 1 to `largest[i]`, each size equally often in turn, the target uniformly from
    what the numbers reach within `targets` (both ends included).
    """
    if len(sizes) != len(largest) or not sizes:
        raise ValueError(f"countdown: sizes {sizes} and largest {largest} must be of one, non-zero length")
    rng = random.Random(f"countdown/{split}/{seed}")
    index = 0
    while True:
        size, top = sizes[index % len(sizes)], largest[index % len(sizes)]
        numbers = tuple(sorted(rng.randint(1, top) for _ in range(size)))
        if split_of(numbers) != split:
            continue
        within = sorted(t for t in reachable(numbers) if targets[0] <= t <= targets[1])
        if not within:
            continue
        index += 1
        yield Task(numbers, rng.choice(within))


def rows(split: Split, seed: int, count: int, warm_up: int = 0, **options) -> list[dict]:
    """`count` instances as rows for the data loader (columns prompt, numbers, target, level), distinct within a level.

    The first `warm_up` of them have the smallest of `sizes` only (level 0), the others all sizes (level 1): a
    curriculum, since the loader asks lower levels first. Raises ValueError where there are not that many.
    """
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    made = []
    if warm_up:
        sizes, largest = options.get("sizes", SIZES), options.get("largest", LARGEST_OF_SIZE)
        easiest = min(range(len(sizes)), key=lambda i: sizes[i])
        easy = {**options, "sizes": (sizes[easiest],), "largest": (largest[easiest],)}
        made = [{**task.row, "level": 0} for task in distinct(split, seed, warm_up, easy)]
    return made + [{**task.row, "level": 1} for task in distinct(split, seed, count - warm_up, options)]


def distinct(split: Split, seed: int, count: int, options: dict) -> list[Task]:
    """The first `count` distinct instances of a stream. Raises ValueError where it seems to have fewer."""
    seen: dict[Task, None] = {}
    for draws, task in enumerate(tasks(split, seed, **options), start=1):
        seen.setdefault(task)
        if len(seen) == count:
            return list(seen)
        if draws > 1000 + 50 * count:
            raise ValueError(
                f"countdown: only {len(seen)} distinct instances of split '{split}' in {draws} draws, {count} asked "
                "for; widen sizes, largest or targets"
            )
    raise AssertionError("unreachable: the stream is endless")
