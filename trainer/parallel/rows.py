"""Rows copied to several places and summed again, by tables instead of atomic additions: the same sums every time.

A table [count, width] names, for every result, the rows that belong to it; the number of rows where there is none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def spread_rows(
    x: Float[Tensor, "count hidden"], source: Int[Tensor, " rows"], table: Int[Tensor, "count width"]
) -> Float[Tensor, "rows hidden"]:
    """Row r is x[source[r]]; `table` lists the rows that each entry of x went to."""
    return _Spread.apply(x, source, table)


def sum_rows(
    rows: Float[Tensor, "rows hidden"],
    source: Int[Tensor, " rows"],
    table: Int[Tensor, "count width"],
    *added: Float[Tensor, "count hidden"],
) -> Float[Tensor, "count hidden"]:
    """Entry t is the sum of the rows that `table` lists for it and of up to two arrays besides, in float32. `source`
    is the way back, the entry of every row."""
    return _Sum.apply(rows, source, table, *added)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, table):
        ctx.save_for_backward(table)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        (table,) = ctx.saved_tensors
        return _total(grad.contiguous(), table), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, source, table, *added):
        ctx.save_for_backward(source)
        ctx.added = len(added)
        return _total(rows.contiguous(), table, *added)

    @staticmethod
    def backward(ctx, grad):
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None, *([grad] * ctx.added)


def _total(rows: Tensor, table: Tensor, *added: Tensor) -> Tensor:
    if rows.is_cuda:
        from trainer.model.kernels import triton_moe

        end = torch.full((), len(rows), dtype=torch.int32, device=rows.device)
        return triton_moe.gather_sum(rows, table, end, *added)
    rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    total = torch.zeros(len(table), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for term in (*(rows.index_select(0, column) for column in table.unbind(1)), *added):
        total += term
    return total.to(rows.dtype)
