"""Every loss against its paper's formula, written here once more in plain Python floats and loops over sequences.
Gradients are held to central differences of that second writing."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.batch import Batch
from trainer.losses import (
    LossOptions,
    combine_metrics,
    correction_ratio,
    correction_weight,
    gap_metrics,
    kl_divergence,
    policy_loss,
)

VALUE = 1e-12  # float64 against Python floats, relative to values of order 1
GRADIENT = 1e-8  # against central differences with a step of 1e-6


@dataclass
class Doc:
    """One packed document: some prompt tokens (never in the loss), then completion tokens with their streams."""

    prompt: int
    new: list[float]
    old: list[float]
    behaviour: list[float]
    reference: list[float]
    teacher: list[float]
    entropy: list[float]
    advantages: list[float]
    masked: list[int] = field(default_factory=list)  # completion tokens outside the loss mask

    def kept(self, stream: str) -> list[float]:
        return [v for t, v in enumerate(getattr(self, stream)) if t not in self.masked]


STREAMS = ("old", "behaviour", "reference", "teacher", "advantages")


def make_docs(seed: int, lengths=(3, 7, 1, 5), spread: float = 0.4, token_advantages: bool = False) -> list[Doc]:
    rng = random.Random(seed)
    docs = []
    for length in lengths:
        new = [-abs(rng.gauss(1.5, 1.0)) for _ in range(length)]
        near = lambda around=new: [v + rng.gauss(0, spread) for v in around]  # noqa: E731
        advantage = rng.gauss(0, 1)
        advantages = [rng.gauss(0, 1) if token_advantages else advantage for _ in range(length)]
        entropy = [abs(rng.gauss(1, 0.5)) for _ in range(length)]
        docs.append(Doc(rng.randint(1, 4), new, near(), near(), near(), near(), entropy, advantages))
    return docs


def make_batch(
    docs: list[Doc], total_tokens: int | None = None, total_sequences: int | None = None, drop=(), dtype=torch.float64
):
    """The docs packed into one batch, with its logprobs (a leaf) and entropy. Prompt tokens carry NaN everywhere."""
    lengths = [d.prompt + len(d.new) for d in docs]
    flat = lambda name: torch.tensor(  # noqa: E731
        [v for d in docs for v in [math.nan] * d.prompt + getattr(d, name)], dtype=dtype
    )
    mask = [m for d in docs for m in [False] * d.prompt + [t not in d.masked for t in range(len(d.new))]]
    batch = Batch(
        tokens=torch.zeros(sum(lengths), dtype=torch.long),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        bounds=torch.tensor([0] + lengths).cumsum(0),
        loss_mask=torch.tensor(mask),
        total_tokens=sum(mask) if total_tokens is None else total_tokens,
        total_sequences=len(docs) if total_sequences is None else total_sequences,
    )
    for name in STREAMS:
        if name not in drop:
            setattr(batch, name if name == "advantages" else f"{name}_logprobs", flat(name))
    return flat("new").requires_grad_(True), flat("entropy").requires_grad_(True), batch


def options(**changes) -> LossOptions:
    return LossOptions(**({"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0} | changes))


# --- the formulas once more ------------------------------------------------------------------------------------------


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def ppo_terms(new, old, adv, low, high):
    """PPO eq. 7, DAPO eq. 10: one term per token."""
    terms = []
    for p, q, a in zip(new, old, adv, strict=True):
        ratio = math.exp(p - q)
        terms.append(-min(ratio * a, clamp(ratio, 1 - low, 1 + high) * a))
    return terms


def gspo_term(new, old, advantage, low, high):
    """GSPO eq. 5 and 7: one term for the sequence."""
    s = math.exp(sum(p - q for p, q in zip(new, old, strict=True)) / len(new))
    return -min(s * advantage, clamp(s, 1 - low, 1 + high) * advantage)


def cispo_terms(new, old, adv, low, high, frozen):
    """MiniMax-M1 eq. 4 and 5; `frozen` are the log-probabilities inside the stop-gradient."""
    return [
        -clamp(math.exp(f - q), 1 - low, 1 + high) * a * p for p, q, a, f in zip(new, old, adv, frozen, strict=True)
    ]


def averaged(per_sequence: list[list[float]], aggregation: str, constant: int | None = None) -> float:
    if aggregation == "token":
        return sum(sum(terms) for terms in per_sequence) / sum(len(terms) for terms in per_sequence)
    if aggregation == "sequence":
        return sum(sum(terms) / len(terms) for terms in per_sequence if terms) / len(per_sequence)
    return sum(sum(terms) / constant for terms in per_sequence) / len(per_sequence)


def kl_terms(new, ref, estimator):
    """Schulman's three estimators with r = reference / policy: -log r, (log r)^2 / 2, (r - 1) - log r."""
    terms = []
    for p, q in zip(new, ref, strict=True):
        log_r = q - p
        terms.append({"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}[estimator])
    return terms


def assert_matches(docs: list[Doc], opts: LossOptions, reference, drop=()):
    """`reference(news)`, a function of one list of completion log-probabilities per document, has the loss's value and
    its central differences are the loss's gradient."""
    logprobs, entropy, batch = make_batch(docs, drop=drop)
    loss, _ = policy_loss(logprobs, entropy, batch, opts)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    news = [list(d.new) for d in docs]
    expected = reference(news)
    assert loss.item() == pytest.approx(expected, abs=VALUE, rel=VALUE)
    for d, start in enumerate(batch.bounds[:-1].tolist()):
        assert (
            gradient[start : start + docs[d].prompt].abs().max() == 0
        )  # prompts teach nothing, even where they are NaN
        for t in range(len(docs[d].new)):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [list(n) for n in news]
                moved[d][t] += step
                sides.append(reference(moved))
            difference = (sides[0] - sides[1]) / 2e-6
            assert gradient[start + docs[d].prompt + t].item() == pytest.approx(difference, abs=GRADIENT)


def selected(docs, news):
    """(new, old, advantages) of the tokens in the loss mask of each document."""
    return [
        ([v for t, v in enumerate(n) if t not in d.masked], d.kept("old"), d.kept("advantages"))
        for d, n in zip(docs, news, strict=True)
    ]


AGGREGATIONS = [("token", None), ("sequence", None), ("constant", 16)]


@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
@pytest.mark.parametrize("bounds", [(0.2, 0.28), (10.0, 10.0)])
def test_ppo_clip_is_the_papers_formula(bounds, aggregation, constant):
    docs = make_docs(1, token_advantages=True)
    docs[1].masked = [2, 3]
    assert_matches(
        docs,
        options(clip_low=bounds[0], clip_high=bounds[1], aggregation=aggregation, constant_length=constant),
        lambda news: averaged([ppo_terms(*s, *bounds) for s in selected(docs, news)], aggregation, constant),
    )


@pytest.mark.parametrize("bounds", [(0.2, 0.28), (3e-4, 4e-4), (10.0, 10.0)])
def test_gspo_is_the_papers_formula(bounds):
    docs = make_docs(2)
    docs[1].masked = [0]
    assert_matches(
        docs,
        options(policy_loss="gspo", clip_low=bounds[0], clip_high=bounds[1]),
        lambda news: sum(gspo_term(n, o, a[0], *bounds) for n, o, a in selected(docs, news)) / len(docs),
    )


def test_gspo_with_token_advantages_is_gspo_token():
    """GSPO-token, eq. 13 and 14: s_i on every token, and the gradient s_i A_t / |y_i| where it is not clipped."""
    docs = make_docs(3, token_advantages=True)
    logprobs, entropy, batch = make_batch(docs)
    loss, _ = policy_loss(logprobs, entropy, batch, options(policy_loss="gspo"))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    value, expected = 0.0, []
    for d in docs:
        s = math.exp(sum(p - q for p, q in zip(d.new, d.old, strict=True)) / len(d.new))
        expected += [0.0] * d.prompt
        for a in d.advantages:
            value -= min(s * a, clamp(s, 0.8, 1.28) * a) / len(d.new) / len(docs)
            passes = s * a <= clamp(s, 0.8, 1.28) * a
            expected.append(-s * a / len(d.new) / len(docs) if passes else 0.0)
    assert loss.item() == pytest.approx(value, abs=VALUE)
    assert gradient.tolist() == pytest.approx(expected, abs=VALUE)


@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
def test_cispo_is_the_papers_formula(aggregation, constant):
    docs = make_docs(4, token_advantages=True)
    frozen = [d.kept("new") for d in docs]
    assert_matches(
        docs,
        options(policy_loss="cispo", clip_low=0.5, aggregation=aggregation, constant_length=constant),
        lambda news: averaged(
            [cispo_terms(*s, 0.5, 0.28, f) for s, f in zip(selected(docs, news), frozen, strict=True)],
            aggregation,
            constant,
        ),
    )


def test_cispo_gives_clipped_tokens_a_gradient_and_ppo_does_not():
    docs = [Doc(1, [-1.0], [-2.0], [-2.0], [-1.0], [-1.0], [1.0], [1.0])]  # ratio e, far above the bound
    for name, gradient_is_zero in (("cispo", False), ("ppo", True)):
        logprobs, entropy, batch = make_batch(docs)
        loss, _ = policy_loss(logprobs, entropy, batch, options(policy_loss=name))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert (gradient[1].item() == 0) == gradient_is_zero


# --- penalties and bonuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
def test_kl_in_the_loss(estimator, aggregation, constant):
    docs = make_docs(5)
    assert_matches(
        docs,
        options(kl_coef=0.3, kl_estimator=estimator, aggregation=aggregation, constant_length=constant),
        lambda news: (
            averaged([ppo_terms(*s, 0.2, 0.28) for s in selected(docs, news)], aggregation, constant)
            + 0.3
            * averaged(
                [kl_terms(n, d.reference, estimator) for d, n in zip(docs, news, strict=True)], aggregation, constant
            )
        ),
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_taken_off_the_advantages_of_all_tokens_before(estimator):
    docs = make_docs(6, token_advantages=True)
    docs[1].masked = [3]

    def shaped(doc, advantages):
        penalties = kl_terms(doc.kept("old"), doc.kept("reference"), estimator)
        return [a - 0.3 * math.fsum(penalties[t:]) for t, a in enumerate(advantages)]

    assert_matches(
        docs,
        options(kl_coef=0.3, kl_estimator=estimator, kl_in="reward", aggregation="token"),
        lambda news: averaged(
            [ppo_terms(n, o, shaped(d, a), 0.2, 0.28) for d, (n, o, a) in zip(docs, selected(docs, news), strict=True)],
            "token",
        ),
    )


def test_k1_in_the_reward_has_the_exact_gradient_of_the_sequence_kl():
    """Expectation over all nine sequences of two tokens, the second drawn given the first."""
    torch.manual_seed(0)
    first, second = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), (3, 3)))
    other_first, other_second = torch.randn(3).double().log_softmax(0), torch.randn(3, 3).double().log_softmax(1)
    p, q = first.log_softmax(0), second.log_softmax(1)
    joint = p[:, None] + q
    kl = (joint.exp() * (joint - other_first[:, None] - other_second)).sum()
    exact = torch.autograd.grad(kl, (first, second), retain_graph=True)
    loss = 0
    for a in range(3):
        for b in range(3):
            reference = [other_first[a].item(), other_second[a, b].item()]
            doc = Doc(1, [0.0] * 2, [0.0] * 2, [0.0] * 2, reference, [0.0] * 2, [0.0] * 2, [0.0] * 2)
            _, _, batch = make_batch([doc], drop=("old", "behaviour", "teacher"))
            logprobs = torch.stack([torch.zeros((), dtype=torch.float64), p[a], q[a, b]])
            opts = options(kl_coef=1.0, kl_estimator="k1", kl_in="reward", aggregation="constant", constant_length=1)
            loss = loss + joint[a, b].exp().detach() * policy_loss(logprobs, None, batch, opts)[0]
    for found, expected in zip(torch.autograd.grad(loss, (first, second)), exact, strict=True):
        assert torch.allclose(found, expected, atol=1e-14)


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("estimator", "bias"), [("k1", 0.0), ("k3", 0.0), ("k2", 0.02)])
def test_estimators_average_to_the_exact_kl(estimator, bias):
    """Over the policy's own distribution k1 and k3 are unbiased (1e-14); k2 is off by less than 0.02 nats here."""
    policy, reference = [0.5, 0.3, 0.2], [0.4, 0.25, 0.35]
    values = kl_divergence(*(torch.tensor(p, dtype=torch.float64).log() for p in (policy, reference)), estimator)
    mean = sum(p * v for p, v in zip(policy, values.tolist(), strict=True))
    assert abs(mean - exact_kl(policy, reference)) <= bias + 1e-14


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.0), ("k2", 1.0)])
def test_expected_gradient_of_k1_is_zero_and_of_k2_that_of_the_kl(estimator, expected):
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64).log()
    log_policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_policy.exp() * (log_policy - reference)).sum(), logits, retain_graph=True)
    terms = kl_divergence(log_policy, reference, estimator)
    (gradient,) = torch.autograd.grad((log_policy.exp().detach() * terms).sum(), logits)
    assert torch.allclose(gradient, expected * exact, atol=1e-14)
    assert exact.abs().max() > 0.01


def test_k3_keeps_its_digits_where_policy_and_reference_almost_agree():
    """exp(-d) - 1 + d in float32 would be rounding noise of 1e-7; the true value of d = 1e-4 is 5e-9."""
    value = kl_divergence(torch.tensor([-1.0]), torch.tensor([-1.0001]), "k3").item()
    d = -1.0 - torch.tensor(-1.0001).double().item()
    assert value == pytest.approx(math.exp(-d) - 1 + d, rel=2e-2, abs=0)
    assert value >= 0


@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
def test_entropy_bonus_has_its_value_and_gradient(aggregation, constant):
    docs = make_docs(7)
    logprobs, entropy, batch = make_batch(docs)
    opts = options(aggregation=aggregation, constant_length=constant)
    plain, _ = policy_loss(logprobs, entropy, batch, opts)
    loss, _ = policy_loss(logprobs, entropy, batch, opts.model_copy(update={"entropy_coef": 0.01}))
    assert (loss - plain).item() == pytest.approx(
        -0.01 * averaged([d.entropy for d in docs], aggregation, constant), abs=VALUE
    )
    (gradient,) = torch.autograd.grad(loss, entropy)
    weight = {"token": lambda d: 1 / 16, "sequence": lambda d: 1 / len(d.new) / 4, "constant": lambda d: 1 / 16 / 4}[
        aggregation
    ]
    expected = [g for d in docs for g in [0.0] * d.prompt + [-0.01 * weight(d)] * len(d.new)]
    assert gradient.tolist() == pytest.approx(expected, abs=VALUE)


# --- the engine's mismatch -------------------------------------------------------------------------------------------


def correction_weights(old, behaviour, correction, level, low, high):
    """TIS: min(ratio, C) and a lower bound likewise; IcePop: the ratio inside the bounds, else 0."""
    logs = [p - q for p, q in zip(old, behaviour, strict=True)]
    if level == "sequence":
        ratios = [math.prod(math.exp(v) for v in logs)] * len(logs)
    elif level == "geometric":
        ratios = [math.prod(math.exp(v) for v in logs) ** (1 / len(logs))] * len(logs)
    else:
        ratios = [math.exp(v) for v in logs]
    if correction == "tis":
        return [clamp(r, low, high) for r in ratios]
    return [r if low <= r <= high else 0.0 for r in ratios]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(("correction", "low", "high"), [("tis", 0.0, 1.2), ("tis", 0.8, 1.1), ("icepop", 0.7, 1.3)])
@pytest.mark.parametrize("loss_name", ["ppo", "cispo"])
def test_corrections_weigh_the_policy_loss(loss_name, correction, low, high, level):
    docs = make_docs(8, token_advantages=True)
    docs[1].masked = [1]
    frozen = [d.kept("new") for d in docs]
    weights = [correction_weights(d.kept("old"), d.kept("behaviour"), correction, level, low, high) for d in docs]
    assert any(low < w < high for ws in weights for w in ws)  # both sides of the bounds are visited
    assert any(not low < w < high for ws in weights for w in ws)

    def reference(news):
        terms = [
            ppo_terms(*s, 0.2, 0.28) if loss_name == "ppo" else cispo_terms(*s, 0.2, 0.28, f)
            for s, f in zip(selected(docs, news), frozen, strict=True)
        ]
        return averaged(
            [[w * t for w, t in zip(ws, ts, strict=True)] for ws, ts in zip(weights, terms, strict=True)], "token"
        )

    assert_matches(
        docs,
        options(
            policy_loss=loss_name,
            aggregation="token",
            correction=correction,
            correction_level=level,
            correction_bounds=(low, high),
        ),
        reference,
    )


def test_open_bounds_are_those_of_the_papers():
    ratios = torch.tensor([0.1, 0.4, 1.0, 3.0, 7.0])
    assert correction_weight(ratios, "tis", *options(correction="tis").bounds)[0].tolist() == pytest.approx(
        [0.1, 0.4, 1.0, 2.0, 2.0]
    )
    assert correction_weight(ratios, "icepop", *options(correction="icepop").bounds)[
        0
    ].tolist() == pytest.approx([0.0, 0.0, 1.0, 3.0, 0.0])


def test_icepop_drops_a_sequence_whose_product_overflows():
    """2,000 tokens that each lost a nat: the weight is infinite, and the token still gets a zero, not a NaN."""
    ratio = correction_ratio(torch.full((2000,), 1.0), torch.zeros(2000, dtype=torch.long), 1, "sequence")
    weight, outside = correction_weight(ratio, "icepop", 0.5, 5.0)
    assert outside.all() and (weight == 0).all()


def test_correction_makes_a_stale_rollout_unbiased():
    """Tokens drawn by an older policy, weighted by old / behaviour: the expected gradient is the on-policy one, and
    without the correction it is not."""
    behaviour, rewards = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    logits = torch.tensor([0.5, 0.1, -0.7], dtype=torch.float64, requires_grad=True)
    gradients = {}
    for name, drawn in (("on-policy", logits.detach().softmax(0)), ("tis", behaviour), ("none", behaviour)):
        loss = torch.zeros((), dtype=torch.float64)
        for token in range(3):
            doc = Doc(1, [0.0], [0.0], [drawn[token].log().item()], [0.0], [0.0], [0.0], [rewards[token].item()])
            _, _, batch = make_batch([doc], drop=("old", "reference", "teacher"))
            logprobs = torch.stack([torch.zeros((), dtype=torch.float64), logits.log_softmax(0)[token]])
            opts = options(correction="none" if name == "none" else "tis", correction_bounds=(0.0, 100.0))
            loss = loss + drawn[token] * policy_loss(logprobs, None, batch, opts)[0]
        (gradients[name],) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradients["tis"], gradients["on-policy"], atol=1e-14)
    assert (gradients["none"] - gradients["on-policy"]).abs().max() > 0.05


# --- what always holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize(("aggregation", "constant"), AGGREGATIONS)
def test_on_policy_gradient_is_reinforce(name, aggregation, constant):
    """Without old log-probabilities every ratio is 1 and the gradient is that of -A log pi, averaged alike."""
    docs = make_docs(9, token_advantages=True)
    logprobs, entropy, batch = make_batch(docs, drop=("old",))
    loss, metrics = policy_loss(
        logprobs, entropy, batch, options(policy_loss=name, aggregation=aggregation, constant_length=constant)
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    weight = {"token": lambda d: 1 / 16, "sequence": lambda d: 1 / len(d.new) / 4, "constant": lambda d: 1 / 16 / 4}[
        aggregation
    ]
    expected = [g for d in docs for g in [0.0] * d.prompt + [-a * weight(d) for a in d.advantages]]
    assert gradient.tolist() == pytest.approx(expected, abs=VALUE)
    combined = combine_metrics([metrics])
    assert combined["ratio"] == 1.0 and combined["clip_fraction"] == 0.0


EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.02, "correction": "tis", "correction_bounds": (0.0, 1.2)}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 7),
    micro_batches=st.integers(1, 4),
    name=st.sampled_from(["ppo", "gspo", "cispo"]),
    aggregation=st.sampled_from(AGGREGATIONS),
    level=st.sampled_from(["token", "sequence", "geometric"]),
    kl_in=st.sampled_from(["loss", "reward"]),
)
def test_packing_never_changes_loss_gradient_or_metrics(seed, count, micro_batches, name, aggregation, level, kl_in):
    rng = random.Random(seed)
    docs = make_docs(seed, lengths=[rng.randint(1, 9) for _ in range(count)], token_advantages=True)
    for d in docs:
        d.masked = [t for t in range(len(d.new)) if rng.random() < 0.2]
    docs[0].masked = []
    tokens = sum(len(d.kept("new")) for d in docs)
    opts = options(
        policy_loss=name,
        aggregation=aggregation[0],
        constant_length=aggregation[1],
        correction_level=level,
        kl_in=kl_in,
        **EVERYTHING,
    )
    homes = [rng.randrange(micro_batches) for _ in docs]
    order = rng.sample(range(count), count)

    def run(groups):
        loss, parts, gradients = 0.0, [], {}
        for group in groups:
            logprobs, entropy, batch = make_batch([docs[i] for i in group], total_tokens=tokens, total_sequences=count)
            share, metrics = policy_loss(logprobs, entropy, batch, opts)
            share.backward()
            loss += share.item()
            parts.append(metrics)
            gradients |= {
                i: (logprobs.grad[a:b], entropy.grad[a:b])
                for i, a, b in zip(group, batch.bounds[:-1], batch.bounds[1:], strict=True)
            }
        return loss, combine_metrics(parts), gradients

    whole = run([range(count)])
    split = run([g for g in ([i for i in order if homes[i] == m] for m in range(micro_batches)) if g])
    assert split[0] == pytest.approx(whole[0], abs=1e-12)
    assert split[1] == pytest.approx(whole[1], abs=1e-12)
    for i in range(count):
        for a, b in zip(split[2][i], whole[2][i], strict=True):
            assert torch.allclose(a, b, atol=1e-13, rtol=0)


def test_float32_is_close_to_float64():
    results = {}
    for dtype in (torch.float32, torch.float64):
        logprobs, entropy, batch = make_batch(make_docs(11, lengths=(40, 7, 90)), dtype=dtype)
        loss, _ = policy_loss(logprobs, entropy, batch, options(**EVERYTHING))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        results[dtype] = (loss.item(), gradient.double())
    assert results[torch.float32][0] == pytest.approx(results[torch.float64][0], rel=1e-6)
    assert (results[torch.float32][1] - results[torch.float64][1]).abs().max() < 1e-7


def test_a_batch_with_nothing_in_the_mask_costs_nothing():
    docs = make_docs(12, lengths=(3,))
    docs[0].masked = [0, 1, 2]
    logprobs, entropy, batch = make_batch(docs, total_tokens=10)
    loss, metrics = policy_loss(logprobs, entropy, batch, options(**EVERYTHING))
    loss.backward()
    assert loss.item() == 0 and (logprobs.grad == 0).all()
    assert metrics["entropy"].tolist() == [0, 0]


# --- distillation ----------------------------------------------------------------------------------------------------


def test_teacher_term_has_the_gradient_of_the_reverse_kl():
    """Exact expectation over one token's distribution: the gradient is that of KL(student || teacher)."""
    logits = torch.tensor([0.3, -0.6, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_student = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_student.exp() * (log_student - teacher.log())).sum(), logits, retain_graph=True)
    loss = 0
    for token in range(4):
        doc = Doc(1, [0.0], [0.0], [0.0], [0.0], [teacher[token].log().item()], [0.0], [0.0])
        _, _, batch = make_batch([doc], drop=("old", "behaviour", "reference", "advantages"))
        logprobs = torch.stack([torch.zeros((), dtype=torch.float64), log_student[token]])
        share, _ = policy_loss(logprobs, None, batch, options(teacher_coef=1.0))
        loss = loss + log_student[token].exp().detach() * share
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, exact, atol=1e-14)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_say():
    docs = make_docs(13, spread=0.8)
    logprobs, entropy, batch = make_batch(docs)
    _, metrics = policy_loss(logprobs, entropy, batch, options(correction="icepop"))
    found = combine_metrics([metrics])
    tokens = [
        (n, o, b, r, q, h, a)
        for d in docs
        for n, o, b, r, q, h, a in zip(
            d.new, d.old, d.behaviour, d.reference, d.teacher, d.entropy, d.advantages, strict=True
        )
    ]
    mean = lambda f: sum(f(*t) for t in tokens) / len(tokens)  # noqa: E731

    def clipped(n, o, a):
        r = math.exp(n - o)
        return (a > 0 and r > 1.28) or (a < 0 and r < 0.8)

    outside = lambda x, low, high: x < low or x > high  # noqa: E731
    expected = {
        "ratio": mean(lambda n, o, *_: math.exp(n - o)),
        "clip_fraction": mean(lambda n, o, b, r, q, h, a: clipped(n, o, a)),
        "gap": mean(lambda n, o, b, *_: abs(o - b)),
        "gap_k3": mean(lambda n, o, b, *_: math.exp(o - b) - 1 - (o - b)),
        "gap_outside": mean(lambda n, o, b, *_: outside(math.exp(o - b), 0.5, 2)),
        "correction": mean(lambda n, o, b, *_: 0 if outside(math.exp(o - b), 0.5, 5) else math.exp(o - b)),
        "correction_fraction": mean(lambda n, o, b, *_: outside(math.exp(o - b), 0.5, 5)),
        "kl_reference": mean(lambda n, o, b, r, *_: math.exp(r - n) - 1 - (r - n)),
        "teacher_kl": mean(lambda n, o, b, r, q, *_: o - q),
        "entropy": mean(lambda n, o, b, r, q, h, a: h),
    }
    assert {k: v for k, v in found.items() if k != "policy_loss"} == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["gap_outside"] < 1 and 0 < expected["clip_fraction"] < 1


def test_policy_loss_metric_leaves_penalties_out():
    logprobs, entropy, batch = make_batch(make_docs(14))
    plain, _ = policy_loss(logprobs, entropy, batch, options())
    _, metrics = policy_loss(logprobs, entropy, batch, options(kl_coef=0.5, entropy_coef=0.5))
    assert combine_metrics([metrics])["policy_loss"] == plain.item()


def test_gap_k3_estimates_the_kl_of_engine_to_trainer():
    engine, trainer = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.45, 0.25, 0.3]))
    per_token = [
        combine_metrics([gap_metrics(trainer.log()[i : i + 1], engine.log()[i : i + 1])])["gap_k3"] for i in range(3)
    ]
    expectation = sum(p * v for p, v in zip(engine.tolist(), per_token, strict=True))
    assert expectation == pytest.approx(exact_kl(engine.tolist(), trainer.tolist()), abs=1e-14)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "drop", "says"),
    [
        ({"kl_coef": 0.1}, ("reference",), "no reference_logprobs"),
        ({"kl_coef": 0.1, "kl_in": "reward"}, ("reference",), "no reference_logprobs"),
        ({"correction": "tis"}, ("behaviour",), "no behaviour_logprobs"),
        ({"teacher_coef": 1.0}, ("teacher",), "no teacher_logprobs"),
        ({}, ("advantages",), "no advantages"),
    ],
)
def test_a_missing_stream_is_named(changes, drop, says):
    logprobs, entropy, batch = make_batch(make_docs(15), drop=drop)
    with pytest.raises(ValueError, match=says):
        policy_loss(logprobs, entropy, batch, options(**changes))


def test_missing_entropy_is_named():
    logprobs, _, batch = make_batch(make_docs(15))
    with pytest.raises(ValueError, match="entropy_coef is 0.1"):
        policy_loss(logprobs, None, batch, options(entropy_coef=0.1))


@pytest.mark.parametrize("stream", ["advantages", "behaviour_logprobs", "old_logprobs", "reference_logprobs"])
def test_a_value_that_is_not_finite_never_becomes_a_gradient(stream):
    logprobs, entropy, batch = make_batch(make_docs(16))
    getattr(batch, stream)[int(batch.loss_mask.nonzero()[2])] = math.nan
    with pytest.raises(ValueError, match=f"{stream}: 1 of 16 tokens"):
        policy_loss(logprobs, entropy, batch, options())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aggregation": "constant"}, "needs a constant_length"),
        ({"constant_length": 5}, "the others take none"),
        ({"correction": "tis", "correction_bounds": (3.0, 2.0)}, "lower bound 3.0 is above the upper bound 2.0"),
        ({"clip_hihg": 0.2}, "clip_hihg"),
        ({"policy_loss": "trpo"}, "policy_loss"),
    ],
)
def test_impossible_options_are_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        LossOptions(**changes)
