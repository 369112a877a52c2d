"""Kernels of trainer.parallel_rows: one read of every row, sums in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _sum_rows(rows, weights, table, out, hidden, width: tl.constexpr, weighted: tl.constexpr, block: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    total = tl.zeros((block,), dtype=tl.float32)
    for j in range(width):
        row = tl.load(table + entry * width + j).to(tl.int64)
        if row >= 0:
            value = tl.load(rows + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
            if weighted:
                value *= tl.load(weights + entry * width + j).to(tl.float32)
            total += value
    tl.store(out + entry * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _back_rows(rows, weights, grad, source, d_rows, d_weights, hidden, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(source + row).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    product = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, hidden, block):
        columns = start + tl.arange(0, block)
        inside = columns < hidden
        g = tl.load(grad + entry * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(rows + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        product += g * value
        tl.store(d_rows + row * hidden + columns, (g * weight).to(d_rows.dtype.element_ty), mask=inside)
    tl.store(d_weights + row, tl.sum(product, axis=0))


def sum_rows(
    rows: Float[Tensor, "rows hidden"], weights: Float[Tensor, "count width"] | None, table: Int[Tensor, "count width"]
) -> Float[Tensor, "count hidden"]:
    """See trainer.parallel_rows.sum_rows. All tensors contiguous."""
    out = rows.new_empty(len(table), rows.shape[1])
    if not len(table):
        return out
    hidden = rows.shape[1]
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (len(table), triton.cdiv(hidden, block))
    given = rows if weights is None else weights.contiguous()
    _sum_rows[grid](
        rows, given, table.contiguous(), out, hidden, table.shape[1], weights is not None, block, num_warps=4
    )
    return out


def back_rows(
    rows: Float[Tensor, "rows hidden"],
    weights: Float[Tensor, " rows"],
    grad: Float[Tensor, "count hidden"],
    source: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, " rows"]]:
    """See trainer.parallel_rows.back_rows. All tensors contiguous."""
    d_rows = torch.empty_like(rows)
    d_weights = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if len(rows):
        block = min(1024, triton.next_power_of_2(rows.shape[1]))
        _back_rows[(len(rows),)](rows, weights, grad, source, d_rows, d_weights, rows.shape[1], block, num_warps=4)
    return d_rows, d_weights
