"""The kernel of trainer.parallel.rows: one read of every row, sums in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor


@triton.jit
def _sum_rows(
    rows, table, first, second, out, hidden, WIDTH: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(WIDTH):
        row = tl.load(table + entry * WIDTH + j).to(tl.int64)
        reach = tl.where(row >= 0, hidden, 0)  # a row that is not there is not read
        total += tl.load(rows + row * hidden + columns, mask=columns < reach, other=0.0).to(tl.float32)
    if ADDED > 0:
        total += tl.load(first + entry * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDED > 1:
        total += tl.load(second + entry * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + entry * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(
    rows: Float[Tensor, "rows hidden"], table: Int[Tensor, "count width"], *added: Float[Tensor, "count hidden"]
) -> Float[Tensor, "count hidden"]:
    """See trainer.parallel.rows.sum_rows; `rows` and `table` contiguous."""
    hidden = rows.shape[1]
    out = torch.empty(len(table), hidden, dtype=rows.dtype, device=rows.device)
    if len(table):
        block = min(triton.next_power_of_2(hidden), 2048)
        terms = [term.contiguous() for term in added] + [out, out]
        _sum_rows[(len(table), triton.cdiv(hidden, block))](
            rows, table, terms[0], terms[1], out, hidden, WIDTH=table.shape[1], ADDED=len(added), BLOCK=block,
            num_warps=min(max(block // 512, 1), 4),
        )  # fmt: skip
    return out
