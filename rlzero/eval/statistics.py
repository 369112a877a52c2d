"""What outcomes of an evaluation amount to: estimates with intervals, majority votes, tests of two models, plans.

Pure functions of numbers. A question has n samples; `correct` counts the right ones among those that were graded. An
interval treats questions as drawn from a population and samples as drawn for each question, so it covers both kinds of
luck: the variance of a mean over questions is the variance between the questions' own means over their number
(clustered by question; Miller, arXiv 2411.00640, section 2.2), and holds both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

FINEST = 64  # 1 / the finest step of a difference of two shares that the exact sign-flip distribution is computed on
FLIPS = 20_000  # random sign flips where no common step exists


class Estimate(NamedTuple):
    """A mean over questions, its interval and its standard error."""

    mean: float
    low: float
    high: float
    stderr: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of values in [0, 1], one a question, with a Wilson interval of the effective number of questions.

    The effective number is that of independent yes-or-no questions with the same standard error, so a share near 0 or 1
    keeps its coverage where mean +- t * stderr loses it. Where all values are equal nothing is known of their spread
    and each question counts as one answer. Raises ValueError without values."""
    found = np.asarray(values, dtype=float)
    if not len(found):
        raise ValueError("an interval needs at least one question")
    mean, count = float(found.mean()), len(found)
    variance = float(found.var(ddof=1)) / count if count > 1 else 0.0
    # The spread of few questions is known badly, and with rare successes worse: t of as many degrees of freedom.
    z = float(stats.t.ppf((1 + level) / 2, max(count - 1, 1)))
    effective = mean * (1 - mean) / variance if variance > 0 else float(count)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(mean * (1 - mean) / effective + (z / (2 * effective)) ** 2)
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), math.sqrt(variance))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples drawn without replacement from `samples`, of which `correct` are right,
    is right: 1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv 2107.03374, equation 1."""
    return g_pass_at_k(samples, correct, k, 0.0)


def g_pass_at_k(samples: int, correct: int, k: int, share: float) -> float:
    """Chance that at least `share` of k samples drawn without replacement are right, and at least one: the
    hypergeometric tail G-Pass@k of arXiv 2412.13147, equation 4; with `share` 0 it is pass@k."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples with {correct} correct: needs 0 <= correct <= n and 1 <= k <= n"
        )
    least = max(1, math.ceil(share * k - 1e-9))
    wrong = samples - correct
    missed = sum(math.comb(correct, i) * math.comb(wrong, k - i) for i in range(min(least, k + 1)))
    return 1.0 - missed / math.comb(samples, k)


# ---- majority votes ----


def equivalence_classes(answers: Sequence[Hashable], same: Callable[[Hashable, Hashable], bool]) -> list[int]:
    """For every answer the number of its class: the first earlier answer that `same` calls equal founds it. None is an
    answer of nobody: -1. Equal answers are compared once."""
    founders: list[Hashable] = []
    known: dict[Hashable, int] = {None: -1}
    for answer in answers:
        if answer not in known:
            known[answer] = next((i for i, other in enumerate(founders) if same(other, answer)), len(founders))
            if known[answer] == len(founders):
                founders.append(answer)
    return [known[answer] for answer in answers]


def consensus_at_k(classes: Sequence[int], correct: Sequence[bool]) -> np.ndarray:
    """cons@k of one question for k = 1 ... n [n]: the chance that the answer which most of k samples drawn without
    replacement give is right. `classes` are as `equivalence_classes` says; samples of -1 do not vote, and a draw
    without votes is wrong. Answers of equally many votes share the draw. A class is right where most of its samples
    are. Exact: subsets are counted, none is drawn."""
    votes = Counter(c for c in classes if c >= 0)
    right = {c: 2 * sum(ok for of, ok in zip(classes, correct, strict=True) if of == c) > n for c, n in votes.items()}
    sizes = tuple(sorted(votes.values()))
    won = np.zeros(len(classes))
    for size, times in Counter(votes[c] for c in votes if right[c]).items():
        won += times * _wins(sizes, size, len(classes))
    return won


@lru_cache(maxsize=4096)
def _wins(sizes: tuple[int, ...], own: int, samples: int) -> np.ndarray:
    """Chance [samples] that a class of `own` votes wins a draw of k = 1 ... samples, where classes of `sizes` (its own
    among them) vote and the rest of the samples does not; of t + 1 classes of most votes each wins 1 / (t + 1).

    For each number of votes c that it can win with, the draws are counted in which the other classes have fewer, or as
    many in t of them: a polynomial in the number of samples drawn, for every t."""
    others = list(sizes)
    others.remove(own)
    silent = samples - sum(sizes)
    total = np.zeros(samples + 1)
    for c in range(1, own + 1):
        rivals = [m for m in others if m >= c]
        free = silent + sum(m for m in others if m < c)
        ways = np.zeros((len(rivals) + 1, samples - c + 1))  # [ties, drawn of the others]
        ways[0, : free + 1] = _binomials(free)[: samples - c + 1]
        for i, m in enumerate(rivals):
            below = _binomials(m)[:c]
            grown = np.zeros_like(ways)
            for drawn, number in enumerate(below):
                grown[: i + 1, drawn:] += number * ways[: i + 1, : ways.shape[1] - drawn]
            if c < ways.shape[1]:
                grown[1 : i + 2, c:] += math.comb(m, c) * ways[: i + 1, : ways.shape[1] - c]
            ways = grown
        shared = (ways / np.arange(1, len(rivals) + 2)[:, None]).sum(axis=0)
        total[c:] += math.comb(own, c) * shared
    return total[1:] / _binomials(samples)[1:]


@lru_cache(maxsize=512)
def _binomials(n: int) -> np.ndarray:
    return np.array([math.comb(n, k) for k in range(n + 1)], dtype=float)


# ---- two models ----


@dataclass(frozen=True)
class Comparison:
    """Of two models on the same questions: the difference of their means with its interval, and the chance of one at
    least as large between equal models."""

    difference: float
    low: float
    high: float
    p_value: float
    questions: int
    test: str


def compare(first: Sequence[float], second: Sequence[float], level: float = 0.95, seed: int = 0) -> Comparison:
    """Second less first, both with one share a question in the same order.

    The test flips the sign of each question's difference: were the models equal, either order would be as likely. Its
    distribution is computed exactly where differences are multiples of a common step (n samples give steps of 1 / n);
    with one sample a question that is McNemar's exact test. Otherwise it is drawn. A draw as large as what was found
    counts half (mid-p), without which few differing questions make false alarms rarer than the level says. The
    interval is clustered by question, with Student's t. Raises ValueError for lists of different or no length."""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired test needs the same questions of both models, found {len(first)} and {len(second)}")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    count, mean = len(differences), float(differences.mean())
    stderr = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    half = float(stats.t.ppf((1 + level) / 2, max(count - 1, 1))) * stderr
    single = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    p_value = sign_flip_p(differences, seed)
    name = "McNemar (exact, mid-p)" if single else "sign flips over questions (mid-p)"
    return Comparison(mean, mean - half, mean + half, p_value, count, name)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided mid-p of the sum of `differences` under random signs; 1 where all are 0."""
    sizes = np.abs(differences[np.abs(differences) > 1e-12])
    if not len(sizes):
        return 1.0
    found = abs(float(differences.sum()))
    step = _common_step(sizes)
    if step is None:
        signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(sizes))) * 2 - 1
        sums = np.abs(signs @ sizes)
        more, equal = float((sums > found + 1e-9).mean()), float((np.abs(sums - found) <= 1e-9).mean())
        return max(more + equal / 2, 1 / FLIPS)
    counts = np.rint(sizes / step).astype(int)
    chances = np.ones(1)  # of the sum's positive part, in steps
    for count in counts:
        grown = np.zeros(len(chances) + count)
        grown[: len(chances)] = chances / 2
        grown[count:] += chances / 2
        chances = grown
    sums = np.abs(2 * np.arange(len(chances)) - counts.sum())
    target = round(found / step)
    return float(chances[sums > target].sum() + chances[sums == target].sum() / 2)


def _common_step(sizes: np.ndarray) -> float | None:
    """1 / n for the smallest n of which all sizes are multiples; None where there is none up to `FINEST`."""
    for n in range(1, FINEST + 1):
        if np.abs(sizes * n - np.rint(sizes * n)).max() < 1e-6:
            return 1 / n
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tasks, adjusted so that any false alarm among them is as rare as the level says (Holm)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# ---- how much is needed ----


@dataclass(frozen=True)
class Spread:
    """Variances of a comparison: `between` of the questions' true differences, `within` the sum over both models of
    p (1 - p), what one sample adds (Miller, arXiv 2411.00640, section 4)."""

    between: float
    within: float


def spread_of(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> Spread:
    """From a pilot's (correct, graded) of the same questions of two models. With one sample a question the two cannot
    be told apart, and all counts as within."""
    within = between = 0.0
    differences, noise = [], []
    for (c1, n1), (c2, n2) in zip(first, second, strict=True):
        differences.append(c2 / n2 - c1 / n1)
        own = [c * (n - c) / (n * (n - 1)) if n > 1 else math.nan for c, n in ((c1, n1), (c2, n2))]
        noise.append((sum(own), own[0] / n1 + own[1] / n2))
    total = float(np.var(differences, ddof=1))
    if any(math.isnan(x) for x, _ in noise):
        return Spread(0.0, total)
    within = float(np.mean([x for x, _ in noise]))
    between = max(0.0, total - float(np.mean([x for _, x in noise])))
    return Spread(between, within)


def questions_needed(difference: float, samples: int, spread: Spread, level: float = 0.95, power: float = 0.8) -> int:
    """Questions of `samples` samples each that a paired test of two models needs to see `difference` with `power`."""
    if not 0 < abs(difference) <= 1 or samples < 1:
        raise ValueError(f"a difference in (0, 1] and at least one sample, found {difference} and {samples}")
    z = float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power))
    return math.ceil(z * z * (spread.between + spread.within / samples) / difference**2)
