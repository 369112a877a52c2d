"""The router's decisions and the order of the tokens by expert, on a GPU, without the host ever knowing a count.

`decide` makes scores, chosen experts and weights of the router's logits in one kernel, which also counts the choices
of every block of tokens; `Counts` are their running sums, and `Order` gives every choice its row from them: a counting
sort. Integer sums only: the same order in every run. All shapes follow from the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _within_best_groups(
    biased, TOKENS: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """-inf where the group is not among the KEPT whose two best experts sum to the most."""
    if GROUPS > 1:
        grouped = tl.reshape(biased, [TOKENS, GROUPS, E // GROUPS])
        best = tl.max(grouped, 2)
        inner = tl.arange(0, E // GROUPS)[None, None, :]
        first = tl.argmax(grouped, 2)
        value = best + tl.max(tl.where(inner == first[:, :, None], float("-inf"), grouped), 2)  # [tokens, groups]
        group = tl.arange(0, GROUPS)[None, :]
        keep = tl.zeros([TOKENS, GROUPS], tl.int32)
        for _ in tl.static_range(KEPT):
            chosen = tl.argmax(value, 1)[:, None]
            keep = tl.where(group == chosen, 1, keep)
            value = tl.where(group == chosen, float("-inf"), value)
        biased = tl.reshape(tl.where(keep[:, :, None] > 0, grouped, float("-inf")), [TOKENS, E])
    return biased


@triton.jit
def _decide(
    logits, bias, replay, scores, experts, weights, counts, n, total, replay_stride, factor, K: tl.constexpr,
    E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, RENORM: tl.constexpr, REPLAY: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E)
    here = token < n
    inside = here[:, None] & (expert < total)[None, :]
    score = tl.load(logits + token[:, None] * total + expert[None, :], mask=inside, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-score))
    tl.store(scores + token[:, None] * total + expert[None, :], score, mask=inside)
    biased = score + tl.load(bias + expert, mask=expert < total, other=0.0)[None, :]
    biased = tl.where((expert < total)[None, :], biased, float("-inf"))
    biased = _within_best_groups(biased, TOKENS, E, GROUPS, KEPT)
    routes_itself = here
    if REPLAY:
        for j in tl.static_range(K):
            routes_itself &= tl.load(replay + token * replay_stride + j, mask=here, other=0) >= 0
        routes_itself = here & (routes_itself == 0)
    slot = tl.arange(0, SLOTS)
    all_experts = tl.zeros([TOKENS, SLOTS], tl.int32)
    all_scores = tl.zeros([TOKENS, SLOTS], tl.float32)
    hits = tl.zeros([TOKENS, E], tl.int32)
    for j in tl.static_range(K):
        chosen = tl.argmax(biased, 1)
        biased = tl.where(expert[None, :] == chosen[:, None], float("-inf"), biased)
        if REPLAY:
            given = tl.load(replay + token * replay_stride + j, mask=here, other=0).to(tl.int32)
            chosen = tl.where(routes_itself, chosen, given)
        one = (expert[None, :] == chosen[:, None]) & here[:, None]
        hits += one.to(tl.int32)
        value = tl.sum(tl.where(one, score, 0.0), 1)
        all_experts = tl.where(slot[None, :] == j, chosen[:, None], all_experts)
        all_scores = tl.where(slot[None, :] == j, value[:, None], all_scores)
    if RENORM:
        all_scores = all_scores / (tl.sum(all_scores, 1) + 1e-20)[:, None]
    place = token[:, None] * K + slot[None, :]
    real = here[:, None] & (slot < K)[None, :]
    tl.store(experts + place, all_experts.to(tl.int64), mask=real)
    tl.store(weights + place, all_scores * factor, mask=real)
    tl.store(counts + tl.program_id(0).to(tl.int64) * total + expert, tl.sum(hits, 0), mask=expert < total)


@triton.jit
def _agree(
    scores, bias, replay, sums, n, total, replay_stride, K: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E)
    known = token < n
    inside = known[:, None] & (expert < total)[None, :]
    score = tl.load(scores + token[:, None] * total + expert[None, :], mask=inside, other=0.0)
    biased = score + tl.load(bias + expert, mask=expert < total, other=0.0)[None, :]
    biased = tl.where((expert < total)[None, :], biased, float("-inf"))
    biased = _within_best_groups(biased, TOKENS, E, GROUPS, KEPT)
    own = tl.zeros([TOKENS, E], tl.int32)
    given = tl.zeros([TOKENS, E], tl.int32)
    for j in tl.static_range(K):
        chosen = tl.argmax(biased, 1)
        one = expert[None, :] == chosen[:, None]
        own = tl.where(one, 1, own)
        biased = tl.where(one, float("-inf"), biased)
        replayed = tl.load(replay + token * replay_stride + j, mask=token < n, other=-1).to(tl.int32)
        known = known & (replayed >= 0)
        given = tl.where(expert[None, :] == replayed[:, None], 1, given)
    common = tl.where(known, tl.sum(own * given, 1), 0)
    tl.store(sums + block * 3, tl.sum(known.to(tl.int32), 0))
    tl.store(sums + block * 3 + 1, tl.sum((known & (common == K)).to(tl.int32), 0))
    tl.store(sums + block * 3 + 2, tl.sum(common, 0))


@triton.jit
def _decide_backward(
    scores, experts, d_weights, d_scores, d_logits, n, total, factor, K: tl.constexpr, E: tl.constexpr,
    RENORM: tl.constexpr, SCORES: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E)
    here = token < n
    inside = here[:, None] & (expert < total)[None, :]
    at = token[:, None] * total + expert[None, :]
    score = tl.load(scores + at, mask=inside, other=0.0)
    slot = tl.arange(0, SLOTS)
    real = here[:, None] & (slot < K)[None, :]
    grad = tl.load(d_weights + token[:, None] * K + slot[None, :], mask=real, other=0.0) * factor
    grad_score = tl.zeros([TOKENS, E], tl.float32)
    if SCORES:
        grad_score = tl.load(d_scores + at, mask=inside, other=0.0)
    mean = tl.zeros([TOKENS], tl.float32)
    norm = tl.full([TOKENS], 1e-20, tl.float32)
    if RENORM:  # w_j = s_j / norm with norm the sum of the chosen s: d s_j = (d w_j - Σ d w_i w_i) / norm
        for j in tl.static_range(K):
            chosen = tl.load(experts + token * K + j, mask=here, other=0).to(tl.int32)
            value = tl.sum(tl.where(expert[None, :] == chosen[:, None], score, 0.0), 1)
            norm += value
            mean += value * tl.sum(tl.where(slot[None, :] == j, grad, 0.0), 1)
        mean = mean / norm
    for j in tl.static_range(K):
        chosen = tl.load(experts + token * K + j, mask=here, other=0).to(tl.int32)
        d_score = tl.sum(tl.where(slot[None, :] == j, grad, 0.0), 1)
        if RENORM:
            d_score = (d_score - mean) / norm
        grad_score += tl.where(expert[None, :] == chosen[:, None], d_score[:, None], 0.0)
    result = grad_score * score * (1.0 - score)
    if HALVES:  # a float32 as the sum of two narrower numbers
        upper = result.to(d_logits.dtype.element_ty)
        lower = (result - upper.to(tl.float32)).to(d_logits.dtype.element_ty)
        at = token[:, None] * (2 * total) + expert[None, :]
        tl.store(d_logits + at, upper, mask=inside)
        tl.store(d_logits + at + total, lower, mask=inside)
    else:
        tl.store(d_logits + at, result.to(d_logits.dtype.element_ty), mask=inside)


@triton.jit
def _count(experts, counts, n, total, K: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E)
    hits = tl.zeros([TOKENS, E], tl.int32)
    for j in tl.static_range(K):
        chosen = tl.load(experts + token * K + j, mask=token < n, other=-1).to(tl.int32)
        hits += (expert[None, :] == chosen[:, None]).to(tl.int32)
    tl.store(counts + block * total + expert, tl.sum(hits, 0), mask=expert < total)


@triton.jit
def _running_sums(counts, starts, ends, load, blocks, total, E: tl.constexpr, BLOCKS: tl.constexpr):
    """One program: all of it is a few thousand numbers."""
    expert = tl.arange(0, E)
    inner = tl.arange(0, BLOCKS)
    known = expert < total
    sums = tl.zeros([E], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + inner
        inside = (block < blocks)[:, None] & known[None, :]
        sums += tl.sum(tl.load(counts + block[:, None] * total + expert[None, :], mask=inside, other=0), 0)
    tl.store(load + expert, sums.to(tl.int64), mask=known)
    end = tl.cumsum(sums, 0)
    tl.store(ends + expert, end, mask=known)
    start = end - sums
    for first in range(0, blocks, BLOCKS):
        block = first + inner
        inside = (block < blocks)[:, None] & known[None, :]
        count = tl.load(counts + block[:, None] * total + expert[None, :], mask=inside, other=0)
        before = start[None, :] + tl.cumsum(count, 0) - count
        tl.store(starts + block[:, None] * total + expert[None, :], before, mask=inside)
        start += tl.sum(count, 0)


@triton.jit
def _place(
    experts, starts, weights, place, row_weights, n, total, K: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, E)
    here = token < n
    hits = tl.zeros([TOKENS, E], tl.int32)
    for j in tl.static_range(K):
        chosen = tl.load(experts + token * K + j, mask=here, other=-1).to(tl.int32)
        hits += (expert[None, :] == chosen[:, None]).to(tl.int32)
    start = tl.load(starts + block * total + expert, mask=expert < total, other=0).to(tl.int32)
    free = start[None, :] + tl.cumsum(hits, 0) - hits  # the next free row of every expert, as the token sees it
    for j in tl.static_range(K):
        chosen = tl.load(experts + token * K + j, mask=here, other=-1).to(tl.int32)
        one = expert[None, :] == chosen[:, None]
        row = tl.sum(tl.where(one, free, 0), 1)
        free += one.to(tl.int32)
        tl.store(place + token * K + j, row, mask=here)
        weight = tl.load(weights + token * K + j, mask=here, other=0.0)
        tl.store(row_weights + row, weight, mask=here)


def _shape(experts: int) -> dict[str, int]:
    """Every kernel here holds a [TOKENS, E] tile."""
    e = triton.next_power_of_2(experts)
    return {"E": e, "TOKENS": max(2048 // e, 8), "num_warps": 4}


def can_decide(experts: int, groups: int) -> bool:
    """Whether `decide` covers this router: it cuts the experts into groups by powers of two."""
    return groups == 1 or (experts & (experts - 1) == 0 and groups & (groups - 1) == 0)


@dataclass(frozen=True)
class Counts:
    """How the choices of a layer are spread over its experts. A block is as many tokens as a program takes."""

    load: Int[Tensor, " experts"]  # int64, tokens sent to each expert
    ends: Int[Tensor, " experts"]  # int32, their running sum: where each expert's rows end
    starts: Int[Tensor, "blocks experts"]  # int32, the first row of every expert that a block's tokens take

    @classmethod
    def of(cls, experts: Int[Tensor, "n k"], total: int) -> Counts:
        """Of any choice of `total` experts. torch.bincount would wait for the GPU."""
        shape = _shape(total)
        n, k = experts.shape
        counts = torch.empty(triton.cdiv(n, shape["TOKENS"]), total, dtype=torch.int32, device=experts.device)
        _count[(len(counts),)](experts, counts, n, total, K=k, **shape)
        return cls._running(counts)

    @classmethod
    def _running(cls, counts: Int[Tensor, "blocks experts"]) -> Counts:
        blocks, total = counts.shape
        load = torch.empty(total, dtype=torch.long, device=counts.device)
        ends, starts = torch.empty(total, dtype=torch.int32, device=counts.device), torch.empty_like(counts)
        e = triton.next_power_of_2(total)
        _running_sums[(1,)](counts, starts, ends, load, blocks, total, E=e, BLOCKS=max(8192 // e, 8), num_warps=8)
        return cls(load, ends, starts)


def decide(
    logits: Float[Tensor, "n experts"],
    bias: Float[Tensor, " experts"],
    replay: Int[Tensor, "n k"] | None,
    groups: int,
    kept_groups: int,
    k: int,
    renormalize: bool,
    factor: float,
) -> tuple[Float[Tensor, "n experts"], Int[Tensor, "n k"], Float[Tensor, "n k"], Counts]:
    """Sigmoid scores (float32), the chosen experts in falling order of score + bias (of equal ones the first; see
    `moe.select_experts` for the rule) or those to be replayed, their weights (float32), and how they are spread."""
    n, total = logits.shape
    shape = _shape(total)
    blocks = triton.cdiv(n, shape["TOKENS"])
    scores = torch.empty_like(logits)
    experts = torch.empty(n, k, dtype=torch.long, device=logits.device)
    weights = logits.new_empty(n, k)
    counts = torch.empty(blocks, total, dtype=torch.int32, device=logits.device)
    if replay is not None and replay.stride(1) != 1:
        replay = replay.contiguous()
    _decide[(blocks,)](
        logits, bias, experts if replay is None else replay, scores, experts, weights, counts, n, total,
        0 if replay is None else replay.stride(0), factor, K=k, GROUPS=groups, KEPT=kept_groups, RENORM=renormalize,
        REPLAY=replay is not None, SLOTS=triton.next_power_of_2(k), **shape,
    )  # fmt: skip
    return scores, experts, weights, Counts._running(counts)


def agreement(
    scores: Float[Tensor, "n experts"],
    bias: Float[Tensor, " experts"],
    replay: Int[Tensor, "n k"],
    groups: int,
    kept_groups: int,
) -> Int[Tensor, " 3"]:
    """What `moe.agreement` counts of the choice that `decide` would make of these scores itself. The host does not
    wait."""
    n, total = scores.shape
    shape = _shape(total)
    blocks = triton.cdiv(n, shape["TOKENS"])
    sums = torch.empty(blocks, 3, dtype=torch.int32, device=scores.device)
    if replay.stride(1) != 1:
        replay = replay.contiguous()
    _agree[(blocks,)](
        scores, bias, replay, sums, n, total, replay.stride(0), K=replay.shape[1], GROUPS=groups, KEPT=kept_groups,
        **shape,
    )  # fmt: skip
    return sums.sum(0)


def decide_backward(
    scores: Float[Tensor, "n experts"],
    experts: Int[Tensor, "n k"],
    d_weights: Float[Tensor, "n k"],
    d_scores: Float[Tensor, "n experts"] | None,
    renormalize: bool,
    factor: float,
    dtype: torch.dtype,
) -> Float[Tensor, "n one_or_two_experts"]:
    """The gradient of the logits: float32, or for a narrower `dtype` two numbers side by side whose sum it is (to the
    square of the dtype's rounding)."""
    (n, total), k = scores.shape, experts.shape[1]
    halves = dtype != torch.float32
    d_logits = torch.empty(n, total * (2 if halves else 1), dtype=dtype, device=scores.device)
    shape = _shape(total)
    _decide_backward[(triton.cdiv(n, shape["TOKENS"]),)](
        scores, experts, d_weights.contiguous(), scores if d_scores is None else d_scores.contiguous(), d_logits, n,
        total, factor, K=k, RENORM=renormalize, SCORES=d_scores is not None, HALVES=halves,
        SLOTS=triton.next_power_of_2(k), **shape,
    )  # fmt: skip
    return d_logits


@dataclass(frozen=True)
class Order:
    """Rows by expert: choice j of token t is row place[t, j], the rows of expert e end before ends[e]; among an
    expert's rows the tokens keep their order."""

    place: Int[Tensor, "n k"]  # int32
    ends: Int[Tensor, " experts"]  # int32
    row_weights: Float[Tensor, " rows"]  # float32, the routing weight of every row

    @classmethod
    def of(cls, experts: Int[Tensor, "n k"], weights: Float[Tensor, "n k"], counts: Counts) -> Order:
        place = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
        row_weights = torch.empty(experts.numel(), dtype=torch.float32, device=experts.device)
        (n, k), total = experts.shape, len(counts.ends)
        shape = _shape(total)
        _place[(len(counts.starts),)](
            experts, counts.starts, weights.contiguous(), place, row_weights, n, total, K=k, **shape
        )
        return cls(place, counts.ends, row_weights)
