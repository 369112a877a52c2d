"""Advantages and shaping against the papers' formulas, in plain Python over lists of the samples that count."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzero.rl.advantages import (
    ADVANTAGES,
    EPSILON,
    dr_grpo,
    grpo,
    overlong_penalty,
    reinforce_pp,
    rloo,
    zero_variance,
)

BOUND = 1e-12


def mean(values):
    return math.fsum(values) / len(values)


def deviation(values):
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / len(values))


def reference_group(name, rewards):
    """One group of rewards that all count."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    if name == "grpo":
        return [(r - mean(rewards)) / (deviation(rewards) + EPSILON) for r in rewards]
    if name == "dr_grpo":
        return [r - mean(rewards) for r in rewards]
    return [r - mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]  # rloo


def reference(name, rewards, mask):
    """Only the samples that count reach the formula; the others are put back as 0."""
    kept = [[r for r, m in zip(rs, ms, strict=True) if m] for rs, ms in zip(rewards, mask, strict=True)]
    if name == "reinforce_pp":
        raw = [[r - mean(group) if len(set(group)) > 1 else 0.0 for r in group] for group in kept]
        every = [v for group in raw for v in group]
        flat = not every or len(set(every)) == 1
        values = [[0.0 if flat else (v - mean(every)) / (deviation(every) + EPSILON) for v in group] for group in raw]
    else:
        values = [reference_group(name, group) for group in kept]
    rows = []
    for group, ms in zip(values, mask, strict=True):
        left = iter(group)
        rows.append([next(left) if m else 0.0 for m in ms])
    return np.array(rows)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 5), samples=st.integers(2, 8), binary=st.booleans())
@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_advantages_are_the_papers_formula_over_the_samples_that_count(name, seed, groups, samples, binary):
    rng = random.Random(seed)
    rewards = [
        [float(rng.random() < 0.4) if binary else rng.gauss(0, 2) for _ in range(samples)] for _ in range(groups)
    ]
    mask = [[rng.random() < 0.8 for _ in range(samples)] for _ in range(groups)]
    given_rewards = np.where(mask, rewards, np.nan)  # what a failed checker leaves
    found = ADVANTAGES[name](given_rewards, np.array(mask))
    np.testing.assert_allclose(found, reference(name, rewards, mask), atol=BOUND, rtol=1e-9)


def test_grpo_by_hand():
    assert grpo(np.array([[1.0, 0.0, 0.0, 0.0]]))[0] == pytest.approx([3**0.5] + [-(3**-0.5)] * 3, rel=1e-5)


def test_rloo_by_hand():
    assert rloo(np.array([[1.0, 0.0, 0.5]]))[0] == pytest.approx([0.75, -0.75, 0.0])


def test_reinforce_pp_of_groups_of_one_normalises_over_the_batch():
    rewards = [0.0, 1.0, 3.0]
    found = reinforce_pp(np.array(rewards)[:, None])[:, 0]
    assert found == pytest.approx([(r - mean(rewards)) / (deviation(rewards) + EPSILON) for r in rewards], abs=BOUND)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_equal_rewards_teach_nothing(name):
    """The mean of seven 0.1 is not 0.1 in floating point; a deviation of 1e-17 must not become an advantage of 1."""
    assert (ADVANTAGES[name](np.full((3, 7), 0.1)) == 0).all()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("counting", [0, 1])
def test_a_group_of_fewer_than_two_that_count_teaches_nothing(name, counting):
    mask = np.zeros((1, 4), dtype=bool)
    mask[0, :counting] = True
    assert (ADVANTAGES[name](np.where(mask, 5.0, np.nan), mask) == 0).all()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_an_unmasked_failure_is_refused(name):
    with pytest.raises(ValueError, match="1 rewards that count are not finite"):
        ADVANTAGES[name](np.array([[1.0, np.nan]]))


def test_a_flat_array_is_refused():
    with pytest.raises(ValueError, match="expected both \\[groups, samples\\]"):
        dr_grpo(np.zeros(4))


def test_zero_variance_groups_are_those_without_a_difference_that_counts():
    nan = np.nan
    rewards = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [1, nan, nan], [nan, nan, nan], [1, nan, 0]])
    mask = ~np.isnan(rewards)
    mask[3] = [True, True, False]  # the one that differs does not count
    assert zero_variance(rewards, mask).tolist() == [True, True, False, True, True, True, False]


def test_zero_variance_groups_are_exactly_those_with_zero_grpo_advantages():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (200, 4)).astype(float)
    mask = rng.random((200, 4)) < 0.7
    assert (zero_variance(rewards, mask) == (grpo(rewards, mask) == 0).all(axis=1)).all()


@pytest.mark.parametrize("penalty", [1.0, 0.25])
def test_overlong_penalty_is_dapo_equation_13(penalty):
    longest, cache = 20480, 4096

    def equation(length):
        if length <= longest - cache:
            return 0.0
        return (longest - cache - length) / cache if length <= longest else -1.0

    lengths = [1, 16384, 16385, 18432, 20479, 20480, 20481, 30000]
    found = overlong_penalty(np.array(lengths), longest, cache, penalty)
    assert found.tolist() == pytest.approx([penalty * equation(n) for n in lengths], abs=BOUND)


def test_a_buffer_of_zero_turns_the_penalty_off():
    assert overlong_penalty(np.array([1, 99, 200]), 100, 0).tolist() == [0, 0, 0]


def test_an_overlong_buffer_longer_than_the_completion_is_refused():
    with pytest.raises(ValueError, match="buffer is 200 tokens and max_tokens 100"):
        overlong_penalty(np.array([1]), 100, 200)
