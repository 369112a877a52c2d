"""Moving tokens to their experts and back, and SwiGLU, on a GPU: every array is read once and written once.

The routing weight is folded into the activation between an expert's two products, so that bringing the rows back is a
plain sum, and the weight's gradient is a dot product inside the kernel of SwiGLU's gradient. Sums are float32 in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _scatter(x, place, rows, end, size, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + token * size + columns, mask=inside)
    last = tl.load(end)
    for j in tl.static_range(K):
        row = tl.load(place + token * K + j).to(tl.int64)
        reach = tl.where(row < last, size, 0)
        tl.store(rows + row * size + columns, value, mask=columns < reach)


@triton.jit
def _gather_sum(
    rows, place, end, first, second, more, y, size, stride, K: tl.constexpr, ADDED: tl.constexpr, MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros([BLOCK], tl.float32)
    last = tl.load(end)
    for j in tl.static_range(K):
        row = tl.load(place + token * K + j).to(tl.int64)
        reach = tl.where(row < last, size, 0)
        total += tl.load(rows + row * size + columns, mask=columns < reach, other=0.0).to(tl.float32)
    at = token * size + columns
    if ADDED > 0:
        total += tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED > 1:
        total += tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(MORE):
        total += tl.load(more + stride * j + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(
    gate_up, weights, out, end, rows, wide, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
):  # fmt: skip
    if ENDS:
        rows = tl.load(end)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < wide)[None, :]
    at = gate_up + row[:, None] * (2 * wide) + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + wide, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        result *= tl.load(weights + row, mask=row < rows, other=0.0)[:, None]
    tl.store(out + row[:, None] * wide + column[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    gate_up, weights, grad, d_gate_up, out, d_weights, end, rows, wide, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    if ENDS:
        rows = tl.load(end)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    weight = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + row, mask=real, other=0.0)
    d_weight = tl.zeros([ROWS], tl.float32)
    for start in range(0, wide, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (column < wide)[None, :]
        at = row[:, None] * (2 * wide) + column[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + wide, mask=inside, other=0.0).to(tl.float32)
        narrow = row[:, None] * wide + column[None, :]
        g = tl.load(grad + narrow, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if KEEP:
            tl.store(out + narrow, (silu * up * weight[:, None]).to(out.dtype.element_ty), mask=inside)
        if WEIGHTED:
            d_weight += tl.sum(g * silu * up, 1)
            g *= weight[:, None]
        d_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(d_gate_up + at, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + at + wide, (g * silu).to(d_gate_up.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(d_weights + row, d_weight, mask=real)


def _columns(size: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(size), 2048)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 4)}


def _tile(wide: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(wide), 256)
    while wide % block and block > 64:  # 768 is 3 blocks of 256, no masked half of a fourth
        block //= 2
    return {"BLOCK": block, "ROWS": max(2048 // block, 1), "num_warps": 4}


def scatter_rows(
    x: Float[Tensor, "n size"],
    place: Int[Tensor, "n k"],
    rows: Float[Tensor, "rows size"],
    end: Int[Tensor, ""],
) -> None:
    """Every token copied to each of its `place`s in `rows` that lies before `end`."""
    (n, size), k = x.shape, place.shape[1]
    shape = _columns(size)
    if n:
        _scatter[(n, triton.cdiv(size, shape["BLOCK"]))](x.contiguous(), place, rows, end, size, K=k, **shape)


def gather_sum(
    rows: Float[Tensor, "rows size"],
    place: Int[Tensor, "n k"],
    end: Int[Tensor, ""],
    *added: Float[Tensor, "n size"],
    more: Float[Tensor, "arrays n size"] | None = None,
) -> Float[Tensor, "n size"]:
    """Every token's sum of its rows before `end`, of up to two arrays besides and of each of `more`."""
    (n, k), size = place.shape, rows.shape[1]
    y = rows.new_empty(n, size)
    terms = [term.contiguous() for term in added] + [rows, rows]
    shape = _columns(size)
    if n:
        _gather_sum[(n, triton.cdiv(size, shape["BLOCK"]))](
            rows, place, end, terms[0], terms[1], rows if more is None else more, y, size, n * size, K=k,
            ADDED=len(added), MORE=0 if more is None else len(more), **shape,
        )  # fmt: skip
    return y


def swiglu_forward(
    gate_up: Float[Tensor, "rows two_wide"],
    weights: Float[Tensor, " rows"] | None = None,
    end: Int[Tensor, ""] | None = None,
) -> Float[Tensor, "rows wide"]:
    """weight · silu(gate) · up of [gate, up]; without weights 1. With `end`, of the rows before it alone."""
    rows, wide = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, wide)
    shape = _tile(wide)
    grid = (triton.cdiv(rows, shape["ROWS"]), triton.cdiv(wide, shape["BLOCK"]))
    if rows:
        _swiglu[grid](
            gate_up, gate_up if weights is None else weights, out, gate_up if end is None else end, rows, wide,
            WEIGHTED=weights is not None, ENDS=end is not None, **shape,
        )  # fmt: skip
    return out


def swiglu_backward(
    gate_up: Float[Tensor, "rows two_wide"],
    grad: Float[Tensor, "rows wide"],
    weights: Float[Tensor, " rows"] | None = None,
    keep: bool = True,
    end: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "rows two_wide"], Float[Tensor, "rows wide"] | None, Float[Tensor, " rows"] | None]:
    """The gradient of `gate_up`; the forward's result once more if asked to `keep` it (the next weight's gradient
    wants it); and the gradient of the weights (float32) where there are any. With `end`, of the rows before it."""
    rows, wide = grad.shape
    weighted = weights is not None
    d_gate_up = torch.empty_like(gate_up)
    out = torch.empty_like(grad) if keep else None
    d_weights = torch.empty_like(weights) if weighted else None
    shape = _tile(wide)
    if rows:
        _swiglu_backward[(triton.cdiv(rows, shape["ROWS"]),)](
            gate_up, weights if weighted else gate_up, grad, d_gate_up, out if keep else grad,
            d_weights if weighted else grad, gate_up if end is None else end, rows, wide, WEIGHTED=weighted, KEEP=keep,
            ENDS=end is not None, **shape,
        )  # fmt: skip
    return d_gate_up, out, d_weights
