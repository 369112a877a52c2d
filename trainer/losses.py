"""Policy losses, KL estimators and off-policy corrections: pure functions on tensors.

The three log-probabilities of a sampled token and what stands between them:

    behaviour   the engine's, when it sampled the token      correction = old / behaviour   (a constant weight)
    old         the trainer's, at the start of the step      ratio      = new / old         (carries the gradient)
    new         the trainer's, now

Whatever makes the engine's distribution differ from the trainer's, other kernels, another precision or weights that
are `staleness` steps older, is in the first quotient alone; what the step's own minibatches move is in the second
(decoupled PPO, arXiv 2110.00641, eq. 4). On-policy, in the first minibatch, every ratio is 1.

`policy_loss` is what the trainer calls. It selects the tokens of the loss mask once; every function below it sees
dense per-token values [tokens] and the document of each token. Sums are divided by the batch's *global* denominators,
so the losses of all micro-batches of a step add up to the step's loss, however it was packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from trainer.batch import Batch

Aggregation = Literal["token", "sequence", "constant"]
Correction = Literal["none", "tis", "icepop"]
CorrectionLevel = Literal["token", "sequence", "geometric"]
KLEstimator = Literal["k1", "k2", "k3"]
Metrics = dict[str, Float[Tensor, " 2"]]  # name -> (sum, number of things summed): adds up over micro-batches and ranks

# Bounds of the correction weight where the config leaves them open: each paper's own values.
CORRECTION_BOUNDS = {"none": (0.0, float("inf")), "tis": (0.0, 2.0), "icepop": (0.5, 5.0)}


class LossOptions(BaseModel):
    """The loss of a step. Defaults are R1-Zero's (arXiv 2501.12948): GRPO averaged by sequence, a clip of 10, which is
    practically off, and a k3 penalty of 1e-3; the paper says nothing of a correction for the engine's mismatch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    clip_low: float = Field(10.0, ge=0)  # ratios are held above 1 - clip_low
    clip_high: float = Field(10.0, ge=0)  # and below 1 + clip_high
    aggregation: Aggregation = "sequence"
    constant_length: int | None = Field(None, gt=0)  # tokens; aggregation `constant` divides every sequence by it
    kl_coef: float = Field(1e-3, ge=0)
    kl_estimator: KLEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"  # reward: off the advantages of a token and of all before it
    entropy_coef: float = 0.0  # of a bonus
    teacher_coef: float = Field(0.0, ge=0)  # on-policy distillation: weight of the reverse KL to the teacher
    correction: Correction = "none"
    correction_level: CorrectionLevel = "token"
    # [low, high] of the correction weight; none takes the paper's, see CORRECTION_BOUNDS
    correction_bounds: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the correction weight."""
        return self.correction_bounds or CORRECTION_BOUNDS[self.correction]

    @model_validator(mode="after")
    def _complete(self) -> LossOptions:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError(
                f"constant_length is {self.constant_length} and aggregation is {self.aggregation}; aggregation "
                "constant needs a constant_length (the longest completion, in tokens), the others take none"
            )
        low, high = self.bounds
        if low > high:
            raise ValueError(f"correction_bounds: the lower bound {low} is above the upper bound {high}")
        return self


# --- sums over the documents of a packed batch -----------------------------------------------------------------------


def document_sum(
    values: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"], count: int
) -> Float[Tensor, " count"]:
    """Sum of `values` over the tokens of each of `count` documents; 0 for a document without tokens."""
    return values.new_zeros(count).index_add(0, documents, values)


def document_mean(
    values: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"], count: int
) -> Float[Tensor, " count"]:
    """Mean of `values` over the tokens of each of `count` documents; 0 for a document without tokens."""
    lengths = document_sum(torch.ones_like(values), documents, count)
    return document_sum(values, documents, count) / lengths.clamp(min=1)


def document_to_go(
    values: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"], count: int
) -> Float[Tensor, " tokens"]:
    """Sum of `values` over each token and all later ones of its document. Tokens stand in document order."""
    wide = values.double()  # the running sum goes over the whole batch, and its differences must keep their digits
    before = wide.cumsum(0) - wide
    ends = document_sum(wide, documents, count).cumsum(0)[documents]
    return (ends - before).to(values.dtype)


def aggregate(
    values: Float[Tensor, " tokens"],
    documents: Int[Tensor, " tokens"],
    count: int,
    kind: Aggregation,
    total_tokens: int,
    total_sequences: int,
    constant_length: int | None = None,
) -> Float[Tensor, ""]:
    """This batch's share of the step's average of per-token `values`, a scalar; the shares of all batches add up to:

    - `sequence`: 1/G sum_i 1/|o_i| sum_t v_it   (GRPO, DeepSeekMath, arXiv 2402.03300, eq. 3)
    - `token`: 1/(sum_i |o_i|) sum_i sum_t v_it   (DAPO, arXiv 2503.14476, eq. 8)
    - `constant`: 1/G sum_i 1/L sum_t v_it with one constant L for all   (Dr. GRPO, arXiv 2503.20783, section 3.2)

    with G = `total_sequences`, sum |o_i| = `total_tokens` and L = `constant_length` of the whole step.
    """
    if kind == "token":
        return values.sum() / total_tokens
    if kind == "sequence":
        return document_mean(values, documents, count).sum() / total_sequences
    if constant_length is None:
        raise ValueError("aggregation constant needs a constant_length, found none")
    return values.sum() / (total_sequences * constant_length)


# --- policy losses ---------------------------------------------------------------------------------------------------


def ppo_clip(
    log_ratio: Float[Tensor, " tokens"], advantages: Float[Tensor, " tokens"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Loss per token and where the bound is active, that is, where the token has no gradient:

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   with r = new / old

    PPO (arXiv 1707.06347, eq. 7) with the bounds apart (clip-higher: DAPO, arXiv 2503.14476, eq. 10).
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    # An equal pair is inside the bounds: its ratio, not the clamp, must carry the gradient.
    active = bounded * advantages < ratio * advantages
    return -torch.where(active, bounded, ratio) * advantages, active


def gspo(
    log_ratio: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    documents: Int[Tensor, " tokens"],
    count: int,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Loss per token and where the bound is active, with the sequence's length-normalised ratio

    s_i = exp(1/|y_i| sum_t log(new / old))   (GSPO, arXiv 2507.18071, eq. 7)

    on each of its tokens: s_it = sg[s_i] new_t / sg[new_t] (GSPO-token, eq. 14). Averaged by sequence it has GSPO's
    value and gradient (eq. 5) where all tokens of a sequence share one advantage, and it allows them to differ.
    """
    sequence = document_mean(log_ratio.detach(), documents, count)[documents]
    return ppo_clip(sequence + log_ratio - log_ratio.detach(), advantages, clip_low, clip_high)


def cispo(
    logprobs: Float[Tensor, " tokens"],
    log_ratio: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Loss per token and where the weight is bounded:

    -sg[clip(r, 1 - clip_low, 1 + clip_high)] A log new   (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)

    The weight is bounded, not the update: every token keeps a gradient. The paper sets no lower bound in effect
    (clip_low of 1 or more).
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs, weight != ratio


# --- penalties -------------------------------------------------------------------------------------------------------


def kl_divergence(
    logprobs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"], estimator: KLEstimator
) -> Float[Tensor, " tokens"]:
    """Estimate in nats per token of KL(policy || reference) from tokens that the policy sampled. With
    d = log policy - log reference (Schulman, "Approximating KL divergence", 2020):

    - `k1` = d: unbiased, can be negative. Only of use in the reward: as a loss its expected gradient is zero.
    - `k2` = d^2 / 2: biased in value, but as a loss its gradient is the KL's (on-policy).
    - `k3` = exp(-d) - 1 + d: unbiased and never negative; the penalty of GRPO (arXiv 2402.03300, eq. 4).
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


# --- off-policy correction -------------------------------------------------------------------------------------------


def correction_ratio(
    log_ratio: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"], count: int, level: CorrectionLevel
) -> Float[Tensor, " tokens"]:
    """old / behaviour at each token, from its logarithm:

    - `token`: the token's own ratio (biased for a sequence, small variance);
    - `sequence`: the product over its sequence, the exact importance weight of the sequence;
    - `geometric`: the geometric mean over its sequence, which does not shrink or grow with length.
    """
    if level == "sequence":
        log_ratio = document_sum(log_ratio, documents, count)[documents]
    elif level == "geometric":
        log_ratio = document_mean(log_ratio, documents, count)[documents]
    return log_ratio.exp()


def correction_weight(
    ratio: Float[Tensor, " tokens"], correction: Correction, low: float, high: float
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Weight of each token's policy loss, and where a bound acted.

    - `tis`, truncated importance sampling: clamp(ratio, low, high), in the paper min(ratio, 2)
      (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025);
    - `icepop`: ratio inside [low, high], 0 outside, so that a token on which engine and trainer disagree teaches
      nothing; in the paper [0.5, 5] (Ling team, "Every step evolves", arXiv 2510.18855, section 3);
    - `none`: 1.
    """
    outside = (ratio < low) | (ratio > high)
    if correction == "tis":
        return ratio.clamp(low, high), outside
    if correction == "icepop":
        return torch.where(outside, 0.0, ratio), outside
    return torch.ones_like(ratio), torch.zeros_like(outside)


# --- the loss --------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Float[Tensor, " n"], entropy: Float[Tensor, " n"] | None, batch: Batch, options: LossOptions
) -> tuple[Float[Tensor, ""], Metrics]:
    """This micro-batch's share of the step's loss (a scalar to call backward on, nothing else to divide), and metrics:

    aggregate(weight x policy_loss + kl_coef x KL(new || reference) - entropy_coef x entropy)

    With kl_in `reward` the penalty is a reward of every token instead, and A_t loses kl_coef x sum of KL_i(old ||
    reference) over i >= t (the return of InstructGPT's reward, arXiv 2203.02155, eq. 2; REINFORCE++, arXiv 2501.03262,
    section 3.1). With k1 that gives the exact gradient of the sequence's KL in expectation. It comes after the group
    statistics.

    `logprobs` and `entropy` are the policy's now, for all n tokens of the batch; values outside the loss mask are
    never read. A batch without `old_logprobs` is on-policy: old is the detached new.

    Metrics, each (sum, count), for `combine_metrics`: `ratio`, `clip_fraction`, `entropy`, `kl_reference` (k3); where
    the batch has the engine's log-probabilities `gap` (mean |log old - log behaviour|), `gap_k3` (k3 estimate of
    KL(behaviour || old)), `gap_outside` (share of old / behaviour outside [0.5, 2]), `correction` (mean weight) and
    `correction_fraction` (share of tokens a bound acted on); `teacher_kl` with a teacher; `policy_loss`, the step's.

    Raises ValueError for a stream that the options need and the batch lacks, and for values that are not finite.
    """
    chosen = batch.loss_mask.nonzero()[:, 0]  # a GPU is waited for here, once for all that follows
    documents = batch.document_ids.to(chosen.device)[chosen]  # bounds may lie on the CPU, see trainer.packing.to_device
    count = len(batch.bounds) - 1
    new = logprobs.index_select(0, chosen)
    streams = _streams(batch, chosen, new.dtype)
    reference, behaviour, teacher = (streams.get(f"{name}_logprobs") for name in ("reference", "behaviour", "teacher"))
    old = streams.get("old_logprobs", new.detach())

    def average(values: Tensor) -> Tensor:
        return aggregate(
            values,
            documents,
            count,
            options.aggregation,
            batch.total_tokens,
            batch.total_sequences,
            options.constant_length,
        )

    metrics: Metrics = {}
    advantages = _advantages(streams.get("advantages"), old, teacher, options)
    if options.kl_coef:
        if reference is None:
            raise ValueError(
                f"kl_coef is {options.kl_coef} and the batch has no reference_logprobs; set it to 0 or give a reference"
            )
        if options.kl_in == "reward":
            penalty = kl_divergence(old, reference, options.kl_estimator)
            advantages = advantages - options.kl_coef * document_to_go(penalty, documents, count)
    log_ratio = new - old
    if options.policy_loss == "ppo":
        per_token, clipped = ppo_clip(log_ratio, advantages, options.clip_low, options.clip_high)
    elif options.policy_loss == "gspo":
        per_token, clipped = gspo(log_ratio, advantages, documents, count, options.clip_low, options.clip_high)
    else:
        per_token, clipped = cispo(new, log_ratio, advantages, options.clip_low, options.clip_high)
    metrics["ratio"] = _sum_and_count(log_ratio.exp())
    metrics["clip_fraction"] = _sum_and_count(clipped)

    if behaviour is not None:
        gap = old - behaviour
        metrics |= gap_metrics(old, behaviour)
        ratio = correction_ratio(gap, documents, count, options.correction_level)
        weight, bounded = correction_weight(ratio, options.correction, *options.bounds)
        per_token = weight * per_token
        metrics["correction"] = _sum_and_count(weight)
        metrics["correction_fraction"] = _sum_and_count(bounded)
    elif options.correction != "none":
        raise ValueError(f"correction is {options.correction} and the batch has no behaviour_logprobs (the engine's)")

    loss = average(per_token)
    metrics["policy_loss"] = torch.stack([loss.detach(), loss.new_zeros(())])  # count 0: a share already, only summed
    if reference is not None:
        metrics["kl_reference"] = _sum_and_count(kl_divergence(new, reference, "k3"))
        if options.kl_in == "loss" and options.kl_coef:
            loss = loss + options.kl_coef * average(kl_divergence(new, reference, options.kl_estimator))
    if entropy is not None:
        entropy = entropy.index_select(0, chosen)
        metrics["entropy"] = _sum_and_count(entropy)
        if options.entropy_coef:
            loss = loss - options.entropy_coef * average(entropy)
    elif options.entropy_coef:
        raise ValueError(f"entropy_coef is {options.entropy_coef} and the policy computed no entropy")
    if teacher is not None:
        metrics["teacher_kl"] = _sum_and_count(old - teacher)
    return loss, metrics


def _streams(
    batch: Batch, chosen: Int[Tensor, " tokens"], dtype: torch.dtype
) -> dict[str, Float[Tensor, " tokens"]]:
    """The per-token values that the batch has, at the chosen tokens, those of the loss mask. Raises ValueError for one
    that is not finite there: it is a failed reward or a broken engine, and must not become a gradient."""
    names = ("advantages", "old_logprobs", "behaviour_logprobs", "reference_logprobs", "teacher_logprobs")
    streams = {n: getattr(batch, n)[chosen].to(dtype) for n in names if getattr(batch, n) is not None}
    broken = [(~torch.isfinite(values)).sum() for values in streams.values()]
    counts = torch.stack(broken).tolist() if broken else []  # one wait for the GPU, not one per stream
    for (name, values), found in zip(streams.items(), counts, strict=True):
        if found:
            raise ValueError(
                f"{name}: {found} of {values.numel()} tokens in the loss mask are not finite; mask their samples"
            )
    return streams


def _advantages(
    given: Float[Tensor, " tokens"] | None,
    old: Float[Tensor, " tokens"],
    teacher: Float[Tensor, " tokens"] | None,
    options: LossOptions,
) -> Float[Tensor, " tokens"]:
    """Advantage of each token. With a teacher the reverse KL joins it as a reward per token, log teacher - log old
    (on-policy distillation; MiniLLM, arXiv 2306.08543, eq. 2, without looking ahead)."""
    if not options.teacher_coef:
        if given is None:
            raise ValueError("the batch has no advantages, and teacher_coef is 0: nothing to learn from")
        return given
    if teacher is None:
        raise ValueError(f"teacher_coef is {options.teacher_coef} and the batch has no teacher_logprobs")
    reverse_kl = options.teacher_coef * (teacher - old)
    return reverse_kl if given is None else given + reverse_kl


# --- metrics ---------------------------------------------------------------------------------------------------------


def gap_metrics(trainer: Float[Tensor, " tokens"], engine: Float[Tensor, " tokens"]) -> Metrics:
    """How far the engine's log-probabilities are from the trainer's: `gap`, `gap_k3` and `gap_outside`, see
    `policy_loss`. The k3 estimate is of KL(engine || trainer), as the engine drew the tokens."""
    difference = (trainer - engine).detach()
    ratio = difference.exp()
    return {
        "gap": _sum_and_count(difference.abs()),
        "gap_k3": _sum_and_count(kl_divergence(engine.detach(), trainer.detach(), "k3")),
        "gap_outside": _sum_and_count((ratio < 0.5) | (ratio > 2)),
    }


def combine_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """The step's metrics from those of its micro-batches (and ranks): sums over counts, or the sum where the count is
    0 (shares of the loss)."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, pair in part.items():
            totals[name] = totals[name] + pair.double() if name in totals else pair.double()
    pairs = torch.stack(list(totals.values())).tolist() if totals else []
    return {name: total / count if count else total for name, (total, count) in zip(totals, pairs, strict=True)}


def _sum_and_count(values: Tensor) -> Float[Tensor, " 2"]:
    values = values.detach()
    total = values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return torch.stack([total, total.new_tensor(float(values.numel()))])
