"""Rows copied to several places and summed again, by tables instead of atomic additions: the same sums every time.

A table [count, width] names, for every result, the rows that belong to it, -1 where there is none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def spread(
    x: Float[Tensor, "count hidden"], source: Int[Tensor, " rows"], table: Int[Tensor, "count width"]
) -> Float[Tensor, "rows hidden"]:
    """Row r is x[source[r]]; `table` lists the rows that each entry of x went to."""
    return _Spread.apply(x, source, table)


def weighted_sum(
    rows: Float[Tensor, "rows hidden"],
    weights: Float[Tensor, "count width"] | None,
    source: Int[Tensor, " rows"],
    table: Int[Tensor, "count width"],
) -> Float[Tensor, "count hidden"]:
    """Entry t is the sum of weights[t, j] · rows[table[t, j]] over the j whose table entry is not -1, in float32.
    `source` is the way back: with weights the flat place t · width + j of every row in the table, without them t."""
    if weights is None:
        return _Sum.apply(rows, source, table)
    return _WeightedSum.apply(rows, weights, source, table)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, table):
        ctx.save_for_backward(table)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        (table,) = ctx.saved_tensors
        return sum_rows(grad, None, table), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, source, table):
        ctx.save_for_backward(source)
        return sum_rows(rows, None, table)

    @staticmethod
    def backward(ctx, grad):
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, source, table):
        ctx.save_for_backward(rows, weights, source)
        return sum_rows(rows, weights, table)

    @staticmethod
    def backward(ctx, grad):
        rows, weights, source = ctx.saved_tensors
        d_rows, d_weight = back_rows(rows, weights.flatten()[source], grad, source // weights.shape[1])
        d_weights = torch.zeros_like(weights)
        d_weights.view(-1)[source] = d_weight.to(weights.dtype)
        return d_rows, d_weights, None, None


def sum_rows(
    rows: Float[Tensor, "rows hidden"], weights: Float[Tensor, "count width"] | None, table: Int[Tensor, "count width"]
) -> Float[Tensor, "count hidden"]:
    """What `weighted_sum` returns, weights None standing for 1."""
    if rows.is_cuda:
        from trainer import triton_rows

        return triton_rows.sum_rows(rows.contiguous(), weights, table)
    total = torch.zeros(len(table), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    if len(rows):
        for j in range(table.shape[1]):
            there = table[:, j] >= 0
            factor = there.to(total.dtype) if weights is None else torch.where(there, weights[:, j], 0.0)
            total.addcmul_(rows.index_select(0, table[:, j].clamp(min=0)).to(total.dtype), factor[:, None])
    return total.to(rows.dtype)


def back_rows(
    rows: Float[Tensor, "rows hidden"],
    weights: Float[Tensor, " rows"],
    grad: Float[Tensor, "count hidden"],
    source: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, " rows"]]:
    """weights[r] · grad[source[r]], and rows[r] · grad[source[r]] summed over hidden, in float32."""
    if rows.is_cuda:
        from trainer import triton_rows

        return triton_rows.back_rows(rows, weights, grad.contiguous(), source)
    wide = torch.promote_types(rows.dtype, torch.float32)
    gathered = grad.index_select(0, source).to(wide)
    return (gathered * weights[:, None]).to(rows.dtype), (rows.to(wide) * gathered).sum(-1)
