"""Kernels of the head: what a loss needs of a row of logits in one read, and its gradient in one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK, WARPS = 4096, 8  # columns a program looks at together


def row_statistics(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    temperature: float,
    logprobs: Float[Tensor, " rows"],
    normalizers: Float[Tensor, " rows"],
    entropies: Float[Tensor, " rows"] | None = None,
    probabilities: Float[Tensor, "rows vocabulary"] | None = None,
) -> None:
    """Fills, for the distributions softmax(logits / temperature): the log-probability of each row's target and the
    logarithm of its normalizer; if given, its entropy (all in float32) and the probabilities in their own dtype."""
    _check(logits, probabilities)
    with torch.cuda.device_of(logits):
        _statistics[(len(logits),)](
            logits,
            targets,
            logprobs,
            normalizers,
            logprobs if entropies is None else entropies,
            logits if probabilities is None else probabilities,
            logits.shape[1],
            1 / temperature,
            ENTROPY=entropies is not None,
            KEEP=probabilities is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def logits_gradient(
    source: Float[Tensor, "rows vocabulary"],
    out: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    temperature: float,
    normalizers: Float[Tensor, " rows"] | None,
    entropies: Float[Tensor, " rows"] | None,
    d_logprobs: Float[Tensor, " rows"] | None,
    d_entropies: Float[Tensor, " rows"] | None,
) -> None:
    """Writes the gradient with respect to the logits into `out`. `source` are the logits where `normalizers` are
    given, else the probabilities, and then may be `out` itself."""
    _check(source, out)
    rows, vocabulary = source.shape
    any_row = next(t for t in (d_logprobs, d_entropies) if t is not None)  # stands in for what is not read
    with torch.cuda.device_of(source):
        _gradient[(rows, triton.cdiv(vocabulary, BLOCK))](
            source,
            out,
            targets,
            any_row if normalizers is None else normalizers,
            any_row if entropies is None else entropies,
            any_row if d_logprobs is None else d_logprobs,
            any_row if d_entropies is None else d_entropies,
            vocabulary,
            1 / temperature,
            LOGITS=normalizers is not None,
            LOGPROB=d_logprobs is not None,
            ENTROPY=d_entropies is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _check(first: Tensor, second: Tensor | None) -> None:
    for tensor in (first, second):
        if tensor is not None and (tensor.shape != first.shape or not tensor.is_contiguous()):
            raise ValueError(f"expected contiguous [rows, vocabulary] {list(first.shape)}, found {list(tensor.shape)}")


@triton.jit
def _statistics(
    logits, targets, logprobs, normalizers, entropies, probabilities, vocabulary, inverse_temperature,
    ENTROPY: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    columns = tl.arange(0, BLOCK)
    # Every lane keeps its own maximum, and sums relative to it: no lane waits for another before the end. The start is
    # finite, so that a difference of two is never NaN.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum of e^(x - top)
    weighted = tl.zeros((BLOCK,), tl.float32)  # sum of e^(x - top) (x - top)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=-1e30) * inverse_temperature
        higher = tl.maximum(top, x)
        shrink = tl.exp(top - higher)
        e = tl.where(inside, tl.exp(x - higher), 0.0)
        if ENTROPY:
            weighted = shrink * (weighted + total * (top - higher)) + e * (x - higher)
        total = total * shrink + e
        top = higher
    best = tl.max(top, 0)
    shrink = tl.exp(top - best)
    mass = tl.sum(total * shrink, 0)
    normalizer = best + tl.log(mass)
    target = tl.load(logits + tl.load(targets + row)) * inverse_temperature
    tl.store(logprobs + row, target - normalizer)
    tl.store(normalizers + row, normalizer)
    if ENTROPY:
        mean = tl.sum(shrink * (weighted + total * (top - best)), 0) / mass
        tl.store(entropies + row, tl.log(mass) - mean)
    if KEEP:
        probabilities += row * vocabulary
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits + start + columns, mask=inside, other=0.0) * inverse_temperature
            p = tl.exp(x - normalizer)
            tl.store(probabilities + start + columns, p.to(probabilities.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    source, out, targets, normalizers, entropies, d_logprobs, d_entropies, vocabulary, inverse_temperature,
    LOGITS: tl.constexpr, LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # d logprob / d logit_j = [j is the target] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    value = tl.load(source + row * vocabulary + columns, mask=inside, other=0.0).to(tl.float32)
    if LOGITS:
        log_p = value * inverse_temperature - tl.load(normalizers + row)
        p = tl.exp(log_p)
    else:
        p = value
        log_p = tl.log(tl.maximum(p, 1e-38))
    factor = tl.zeros((BLOCK,), tl.float32)
    if LOGPROB:
        d_logprob = tl.load(d_logprobs + row)
        factor -= d_logprob
    if ENTROPY:
        factor -= tl.load(d_entropies + row) * (log_p + tl.load(entropies + row))
    grad = p * factor
    if LOGPROB:
        grad += tl.where(columns == tl.load(targets + row), d_logprob, 0.0)
    tl.store(out + row * vocabulary + columns, (grad * inverse_temperature).to(out.dtype.element_ty), mask=inside)
