"""How far engine and trainer are apart. Only log-probabilities see every weight of the engine, repacked and derived
ones included, so each weight sync ends with this comparison, and so does step 0."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

LOW, HIGH = 0.5, 2.0
COUNT = 8  # sequences of every probe; those behind them reach past switches, see `far_sequences`
PAST = 32  # tokens that they have past the switch
MOST_LOGITS = 1 << 29  # of one scored sequence: 2 GiB in an engine that holds all of them in float32


def probe_sequences(
    vocab_size: int, *, count: int = COUNT, length: int = 32, seed: int = 0, without: Collection[int] = ()
) -> list[list[int]]:
    """`count` fixed sequences of `length` random token ids below `vocab_size`, none of them in `without` (special
    tokens). The same arguments give the same sequences on every machine."""
    tokens = np.setdiff1d(np.arange(vocab_size), np.array(sorted(without), dtype=np.int64))
    if len(tokens) == 0 or count < 1 or length < 2:
        raise ValueError(
            f"a probe needs a token to draw, a sequence and two tokens in it; got {len(tokens)} tokens, "
            f"{count} sequences of {length}"
        )
    return np.random.Generator(np.random.PCG64(seed)).choice(tokens, size=(count, length)).tolist()


def far_sequences(
    switches: Sequence[int], longest: int, vocab_size: int, *, seed: int = 1, without: Collection[int] = ()
) -> dict[int, list[int]]:
    """By switch, one sequence for each of `switches` (lengths behind which a model computes otherwise: sliding windows,
    borders of its rotation) that ends up to PAST tokens behind it. Left out where no sequence of the run (`longest`
    tokens) gets there, and where an engine would hold more than MOST_LOGITS logits."""
    reach = min(longest, MOST_LOGITS // vocab_size)
    return {
        border: probe_sequences(vocab_size, count=1, length=min(border + PAST, reach), seed=seed, without=without)[0]
        for border in switches
        if border + 1 < reach
    }


def worst_logprob_diff(
    engine: Sequence[np.ndarray], trainer: Sequence[np.ndarray], switches: Iterable[int] = ()
) -> dict[str, float]:
    """The greatest `logprob_diff` among the first COUNT sequences together and each far one behind its switch (of the
    tokens before it a far sequence has too many to show what changes there)."""
    parts = [logprob_diff(engine[:COUNT], trainer[:COUNT])]
    for border, e, t in zip(switches, engine[COUNT:], trainer[COUNT:], strict=False):
        parts.append(logprob_diff([e], [t], first=border))  # the token at `border` is the first to see the switch
    return max(parts, key=lambda part: part["mean_abs"])


def logprob_diff(engine: Sequence[np.ndarray], trainer: Sequence[np.ndarray], *, first: int = 1) -> dict[str, float]:
    """The distance between two sides' log-probabilities of the same tokens, over all tokens.

    `first` is the first position that counts: 1 for whole sequences as `score` returns them (entry 0 is not a
    log-probability), 0 for completions. With d = trainer - engine per token:

    - `mean_abs`, `max_abs`: of |d|, in nats
    - `k3`: mean of exp(d) - 1 - d, the estimator of KL(engine || trainer) of Schulman, "Approximating KL Divergence"
    - `outside`: share of tokens whose ratio exp(d) lies outside [0.5, 2]
    - `tokens`: how many were compared

    A value that is not finite on either side counts as infinitely far, so that no gate lets it pass.
    """
    if len(engine) != len(trainer):
        raise ValueError(f"{len(engine)} sequences of the engine cannot be compared with {len(trainer)} of the trainer")
    for i, (e, t) in enumerate(zip(engine, trainer, strict=True)):
        if len(e) != len(t):
            raise ValueError(f"sequence {i} has {len(e)} log-probabilities of the engine and {len(t)} of the trainer")
    parts = [
        np.asarray(t, np.float64)[first:] - np.asarray(e, np.float64)[first:]
        for e, t in zip(engine, trainer, strict=True)
    ]
    d = np.concatenate(parts) if parts else np.empty(0)
    if len(d) == 0:
        raise ValueError("nothing to compare: no sequence has a token that counts")
    if not np.isfinite(d).all():
        return {"mean_abs": np.inf, "max_abs": np.inf, "k3": np.inf, "outside": 1.0, "tokens": float(len(d))}
    with np.errstate(over="ignore"):
        ratio = np.exp(d)
    return {
        "mean_abs": float(np.abs(d).mean()),
        "max_abs": float(np.abs(d).max()),
        "k3": float((ratio - 1 - d).mean()),
        "outside": float(((ratio < LOW) | (ratio > HIGH)).mean()),
        "tokens": float(len(d)),
    }
