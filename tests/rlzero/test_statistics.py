"""Statistics of evaluations against enumeration, textbook cases and simulation."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rlzero.eval import statistics


def brute_consensus(classes: list[int], correct: list[bool], k: int) -> Fraction:
    """Every subset of k, ties shared."""
    right = {}
    for c in set(classes):
        votes = [ok for of, ok in zip(classes, correct, strict=True) if of == c]
        right[c] = 2 * sum(votes) > len(votes)
    total, draws = Fraction(0), 0
    for subset in itertools.combinations(range(len(classes)), k):
        votes = Counter(classes[i] for i in subset if classes[i] >= 0)
        draws += 1
        if votes:
            best = max(votes.values())
            winners = [c for c, n in votes.items() if n == best]
            total += Fraction(sum(right[c] for c in winners), len(winners))
    return total / draws


@pytest.mark.parametrize("seed", range(12))
def test_consensus_is_what_enumerating_all_draws_gives(seed):
    random_ = random.Random(seed)
    n = random_.randint(1, 10)
    classes = [random_.choice([-1, 0, 0, 1, 2, 3]) for _ in range(n)]
    truth = {c: random_.random() < 0.5 for c in range(4)}
    correct = [truth.get(c, False) ^ (random_.random() < 0.1) for c in classes]
    found = statistics.consensus_at_k(classes, correct)
    for k in range(1, n + 1):
        assert found[k - 1] == pytest.approx(float(brute_consensus(classes, correct, k)), abs=1e-12)


def test_consensus_of_500_questions_of_64_samples_takes_less_than_a_second():
    random_ = np.random.default_rng(0)
    questions = []
    for _ in range(500):  # from one answer nearly always to 64 different ones
        classes = random_.zipf(1.2 + 3 * random_.random(), 64) % 40
        questions.append((classes.tolist(), (classes == 1).tolist()))
    began = time.process_time()
    found = [statistics.consensus_at_k(*question) for question in questions]
    assert time.process_time() - began < 1.0
    for (classes, correct), chances in zip(questions, found, strict=True):
        assert chances[0] == pytest.approx(sum(correct) / 64, abs=1e-12)  # one vote is one sample
        assert ((chances >= -1e-12) & (chances <= 1 + 1e-12)).all()
        top = Counter(classes).most_common(2)
        if len(top) == 1 or top[0][1] > top[1][1]:
            assert chances[63] == pytest.approx(float(top[0][0] == 1), abs=1e-12)


def test_answers_are_one_class_where_the_checker_calls_them_equal():
    same = lambda a, b: Fraction(a) == Fraction(b)  # noqa: E731
    assert statistics.equivalence_classes(["1/2", "0.5", None, "3", "0.50", "1/2"], same) == [0, 0, -1, 1, 0, 0]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (8, 3, 4), (16, 16, 5), (7, 0, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert statistics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    for share in (0.25, 0.5, 1.0):
        stable = sum(sum(subset) >= max(1, math.ceil(share * k)) for subset in subsets) / len(subsets)
        assert statistics.g_pass_at_k(n, c, k, share) == pytest.approx(stable, abs=1e-12)


def test_one_answer_a_question_has_the_textbook_wilson_interval():
    values = [1.0] * 400 + [0.0] * 100
    expected = stats.binomtest(400, 500).proportion_ci(method="wilson")
    found = statistics.mean_interval(values)
    assert found.mean == 0.8
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=5e-4)  # t, not the normal


def test_an_interval_of_equal_values_is_not_a_point():
    found = statistics.mean_interval([1.0] * 30)
    assert found.high == 1.0 and 0.8 < found.low < 0.95
    with pytest.raises(ValueError, match="at least one question"):
        statistics.mean_interval([])


def test_the_paired_test_of_single_samples_is_mcnemars():
    first = [1] * 50 + [0] * 50
    second = [1] * 47 + [0] * 3 + [1] * 12 + [0] * 38
    p = sum(math.comb(15, i) for i in range(4)) / 2**15 * 2 - math.comb(15, 3) / 2**15
    found = statistics.compare(first, second)
    assert found.p_value == pytest.approx(p, rel=1e-9) and found.test.startswith("McNemar")
    assert found.difference == pytest.approx(0.09) and found.low < 0.09 < found.high


def test_the_exact_and_the_drawn_sign_flips_agree():
    random_ = np.random.default_rng(1)
    differences = random_.integers(-8, 10, 60) / 16
    exact = statistics.sign_flip_p(differences)
    drawn = statistics.sign_flip_p(differences + 1e-4 * random_.standard_normal(60))  # no common step
    assert drawn == pytest.approx(exact, abs=0.015)
    assert statistics.sign_flip_p(np.zeros(5)) == 1.0


def test_equal_models_are_rarely_told_apart_and_different_ones_mostly():
    random_ = np.random.default_rng(2)

    def alarms(gain: float) -> float:
        found = 0
        for _ in range(300):
            p = random_.beta(1, 1, 100)
            first, second = random_.binomial(4, p) / 4, random_.binomial(4, np.clip(p + gain, 0, 1)) / 4
            found += statistics.compare(first, second).p_value < 0.05
        return found / 300

    assert 0.02 <= alarms(0.0) <= 0.08 and alarms(0.12) > 0.8


def test_holm_adjusts_the_smallest_most():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_the_planned_number_of_questions_has_the_planned_power():
    random_ = np.random.default_rng(3)
    spread = statistics.Spread(between=0.01, within=2 * 0.15)
    count = statistics.questions_needed(0.05, 4, spread)

    def seen() -> bool:
        p = random_.normal(0.5, 0.2, count)
        noise = math.sqrt(0.15 / 4)
        first = p + noise * random_.standard_normal(count)
        second = p + 0.05 + random_.normal(0, 0.1, count) + noise * random_.standard_normal(count)
        return (second - first).mean() / (second - first).std() * math.sqrt(count) > stats.norm.ppf(0.975)

    assert 0.72 <= np.mean([seen() for _ in range(300)]) <= 0.88


def test_a_pilots_spread_is_told_apart_into_questions_and_samples():
    random_ = np.random.default_rng(4)
    p, gain = random_.uniform(0.3, 0.7, 4000), random_.normal(0, 0.1, 4000)
    pilot = [[(int(c), 8) for c in random_.binomial(8, q)] for q in (p, np.clip(p + gain, 0, 1))]
    found = statistics.spread_of(*pilot)
    assert found.between == pytest.approx(0.01, abs=0.002)
    assert found.within == pytest.approx(float(np.mean(p * (1 - p)) * 2), rel=0.06)
    assert statistics.spread_of([(1, 1), (0, 1), (1, 1)], [(1, 1), (1, 1), (0, 1)]).between == 0.0


def test_intervals_cover_the_truth_as_often_as_they_say():
    random_ = np.random.default_rng(5)
    for rate, samples in ((0.1, 1), (0.5, 4)):
        p = random_.beta(rate * 2, (1 - rate) * 2, (600, 200))
        found = [statistics.mean_interval(row) for row in random_.binomial(samples, p) / samples]
        assert 0.925 <= np.mean([e.low <= rate <= e.high for e in found]) <= 0.975
