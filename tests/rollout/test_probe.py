"""The probe: known distances, no value slips through a gate."""

import math

import numpy as np
import pytest

from rollout.probe import COUNT, far_sequences, logprob_diff, probe_sequences, worst_logprob_diff


def test_gap_of_known_distances():
    engine = [np.array([0.0, -1.0, -2.0]), np.array([0.0, -3.0])]
    trainer = [np.array([0.0, -1.5, -2.0]), np.array([0.0, -2.0])]  # d = -0.5, 0, 1
    found = logprob_diff(engine, trainer)
    assert found["tokens"] == 3
    assert found["mean_abs"] == pytest.approx(0.5)
    assert found["max_abs"] == pytest.approx(1.0)
    assert found["k3"] == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.e - 1 - 1) / 3)
    assert found["outside"] == pytest.approx(1 / 3)  # exp(1) alone is above 2


def test_k3_estimates_the_divergence_of_engine_from_trainer():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(16)), rng.dirichlet(np.ones(16) * 8) * 0.5 + 0.5 / 16
    drawn = rng.choice(16, size=400_000, p=p)
    divergence = float((p * np.log(p / q)).sum())
    assert logprob_diff([np.log(p[drawn])], [np.log(q[drawn])], first=0)["k3"] == pytest.approx(divergence, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_infinitely_far(bad):
    found = logprob_diff([np.array([-1.0, -1.0])], [np.array([-1.0, bad])], first=0)
    assert found["mean_abs"] == found["k3"] == math.inf and found["outside"] == 1.0


def test_both_sides_must_hold_the_same_tokens():
    with pytest.raises(ValueError, match="2 sequences of the engine .* 1 of the trainer"):
        logprob_diff([np.zeros(2), np.zeros(2)], [np.zeros(2)])
    with pytest.raises(ValueError, match="sequence 0 has 3 .* 2 of the trainer"):
        logprob_diff([np.zeros(3)], [np.zeros(2)])
    with pytest.raises(ValueError, match="nothing to compare"):
        logprob_diff([np.zeros(1)], [np.zeros(1)])


def test_probe_is_fixed_and_avoids_special_tokens():
    first = probe_sequences(40, count=3, length=50, without={0, 39})
    assert first == probe_sequences(40, count=3, length=50, without={0, 39})
    assert [len(s) for s in first] == [50] * 3
    assert {t for s in first for t in s} <= set(range(1, 39))
    assert first != probe_sequences(40, count=3, length=50, without={0, 39}, seed=1)


def test_far_sequences_end_behind_each_switch_that_a_run_reaches():
    far = far_sequences([16, 128, 500], longest=150, vocab_size=40, without={0})
    assert {border: len(tokens) for border, tokens in far.items()} == {16: 48, 128: 150}
    assert not far_sequences([4096], longest=8192, vocab_size=1 << 18)  # more logits than an engine may hold


def test_a_difference_behind_a_switch_is_not_thinned_by_the_tokens_before_it():
    near, far = [np.zeros(32)] * COUNT, np.zeros(4128)
    off = far.copy()
    off[4096:] = 0.5
    assert worst_logprob_diff([*near, far], [*near, off], [4096])["mean_abs"] == pytest.approx(0.5)
