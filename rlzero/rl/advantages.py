"""From rewards to advantages: group statistics, filters and length shaping, pure functions on arrays.

Everywhere `rewards` is [groups, samples] and `mask` is True where a sample counts. A sample whose checker failed has
mask False (and a NaN reward): it enters no mean, no deviation and no baseline, and its advantage is 0, to be left
out of the loss as well. Advantages come back as float64 [groups, samples].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Rewards = Float[np.ndarray, "groups samples"]
Mask = Bool[np.ndarray, "groups samples"]

EPSILON = 1e-6  # added to a standard deviation before dividing by it


def grpo(rewards: Rewards, mask: Mask | None = None) -> Rewards:
    """(r_i - mean(r)) / std(r) within the group (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2; R1, arXiv
    2501.12948, eq. 3), with the deviation of the group itself (divided by its size). Equal rewards give 0."""
    values, mask = _masked(rewards, mask)
    centred = _centred(values, mask)
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return np.where(_equal(values, mask)[:, None], 0.0, centred / (deviation + EPSILON))


def dr_grpo(rewards: Rewards, mask: Mask | None = None) -> Rewards:
    """r_i - mean(r) within the group (Dr. GRPO, arXiv 2503.20783, section 3.2): dividing by the deviation would weigh
    questions by how hard they are."""
    values, mask = _masked(rewards, mask)
    return _centred(values, mask)


def rloo(rewards: Rewards, mask: Mask | None = None) -> Rewards:
    """r_i - mean of the group's *other* rewards (RLOO, arXiv 2402.14740, eq. 8). A sample without others gets 0."""
    values, mask = _masked(rewards, mask)
    count = mask.sum(axis=1, keepdims=True)
    return _centred(values, mask) * count / np.maximum(count - 1, 1)


def reinforce_pp(rewards: Rewards, mask: Mask | None = None) -> Rewards:
    """Rewards less their group's mean, divided by the deviation over the whole *batch*:

    A' = r_i - mean_group(r),   A = (A' - mean_batch(A')) / std_batch(A')

    (REINFORCE++ with baseline, arXiv 2501.03262, section 3.2; its KL penalty is `loss.kl_estimator` k2 in the loss.)
    Groups of one have no baseline: there A' is r_i, which is REINFORCE++ itself. With `loss.kl_in` reward the trainer
    takes the penalty of section 3.1 off each token's advantage after this normalisation, not before it.
    """
    values, mask = _masked(rewards, mask)
    raw = values if values.shape[1] == 1 else _centred(values, mask)
    return np.where(mask, _normalised(raw, raw[mask]), 0.0)


ADVANTAGES: dict[str, Callable[[Rewards, Mask | None], Rewards]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
}


# --- which groups and samples take part ------------------------------------------------------------------------------


def zero_variance(rewards: Rewards, mask: Mask | None = None) -> Bool[np.ndarray, " groups"]:
    """Groups that teach nothing, as all rewards that count are equal (all right, all wrong) or fewer than two count.
    Dynamic sampling replaces them (DAPO, arXiv 2503.14476, eq. 11)."""
    values, mask = _masked(rewards, mask)
    return _equal(values, mask)


# --- shaping of rewards ----------------------------------------------------------------------------------------------


def overlong_penalty(
    lengths: Int[np.ndarray, "*shape"], max_tokens: int, buffer: int, penalty: float = 1.0
) -> Float[np.ndarray, "*shape"]:
    """What to *add* to the reward of a completion of that many tokens (0 or negative): nothing up to
    max_tokens - buffer, then falling linearly to -penalty at max_tokens, and -penalty beyond.

    Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13: L_max = `max_tokens`, L_cache = `buffer`). A buffer of 0
    turns it off.
    """
    if not 0 <= buffer <= max_tokens:
        raise ValueError(
            f"overlong buffer is {buffer} tokens and max_tokens {max_tokens}; it must lie between 0 and that"
        )
    lengths = np.asarray(lengths)
    if buffer == 0:
        return np.zeros(lengths.shape)
    excess = np.clip((lengths - (max_tokens - buffer)) / buffer, 0.0, 1.0)
    return -penalty * excess + 0.0  # + 0.0: no negative zeros in the log


# --- statistics of what counts ---------------------------------------------------------------------------------------


def _masked(rewards: Rewards, mask: Mask | None) -> tuple[Rewards, Mask]:
    """Rewards as float64 with 0 where they do not count, and the mask."""
    rewards = np.asarray(rewards, dtype=np.float64)
    mask = np.ones(rewards.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if rewards.ndim != 2 or mask.shape != rewards.shape:
        raise ValueError(
            f"rewards of shape {rewards.shape} with a mask of {mask.shape}; expected both [groups, samples]"
        )
    broken = int((~np.isfinite(rewards[mask])).sum())
    if broken:  # a failed checker is NaN: it must have been masked, and must not spread over its group
        raise ValueError(f"{broken} rewards that count are not finite; samples whose checker failed must be masked")
    return np.where(mask, rewards, 0.0), mask


def _centred(values: Rewards, mask: Mask) -> Rewards:
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    mean = values.sum(axis=1, keepdims=True) / count
    # Rounding of the mean must not make a difference where there is none.
    return np.where(mask & ~_equal(values, mask)[:, None], values - mean, 0.0)


def _equal(values: Rewards, mask: Mask) -> Bool[np.ndarray, " groups"]:
    highest = np.where(mask, values, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(mask, values, np.inf).min(axis=1, initial=np.inf)
    return highest <= lowest  # with nothing that counts: -inf <= inf


def _normalised(values: np.ndarray, population: np.ndarray) -> np.ndarray:
    if population.size == 0 or population.max() == population.min():
        return np.zeros_like(values)
    return (values - population.mean()) / (population.std() + EPSILON)
