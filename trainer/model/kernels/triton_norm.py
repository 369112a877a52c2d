"""RMSNorm on a GPU, one pass over the rows each way, together with what stands beside it in the model.

- `add_norm`: the residual's sum and the norm of it; backward, the norm's gradient and the residual's are one sum.
- `latent_norms`: the two norms of MLA's latent vectors, which read and write slices of one fused projection.

Statistics and sums are float32, results are rounded once. A weight's gradient is summed in float32 in a fixed order:
the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

PROGRAMS = 512  # of the backward pass; each sums the weight's gradient over its share of the rows


@triton.jit
def _forward(x, delta, weight, total, y, inverse_rms, size, x_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # what the rest of the model sees is what is normed
        tl.store(total + row * size + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(inverse_rms + row, r)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, (value * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, extra, x, weight, inverse_rms, dx, dw, rows, size, x_stride, dx_stride, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum_dw = tl.zeros([BLOCK], tl.float32)
    row = first.to(tl.int64)
    for _ in range(first, rows, tl.num_programs(0)):
        g = tl.load(grad + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_rms + row)
        normed = value * r
        sum_dw += g * normed
        g *= w
        result = r * (g - normed * (tl.sum(g * normed, 0) / size))
        if EXTRA:
            result += tl.load(extra + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * dx_stride + columns, result.to(dx.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    tl.store(dw + first.to(tl.int64) * size + columns, sum_dw, mask=inside)


@triton.jit
def _latents(
    x, q_weight, kv_weight, q, kv, inverse_rms, q_size, kv_size, x_stride, eps, HAS_Q: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, KV_BLOCK)
    inside = column < kv_size
    value = tl.load(x + row * x_stride + q_size + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_Q:
        q_column = tl.arange(0, Q_BLOCK)
        q_inside = q_column < q_size
        q_value = tl.load(x + row * x_stride + q_column, mask=q_inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(q_value * q_value, 0) / q_size + eps)
        tl.store(inverse_rms + 2 * row + 1, r)
        w = tl.load(q_weight + q_column, mask=q_inside, other=0.0).to(tl.float32)
        tl.store(q + row * q_size + q_column, (q_value * r * w).to(q.dtype.element_ty), mask=q_inside)
    r = 1.0 / tl.sqrt(tl.sum(value * value, 0) / kv_size + eps)
    tl.store(inverse_rms + 2 * row, r)
    w = tl.load(kv_weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(kv + row * kv_size + column, (value * r * w).to(kv.dtype.element_ty), mask=inside)


@triton.jit
def _latents_backward(
    dq, dkv, d_rope, x, q_weight, kv_weight, inverse_rms, dx, dw, rows, q_size, kv_size, rope_size, x_stride,
    HAS_Q: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    column = tl.arange(0, KV_BLOCK)
    inside = column < kv_size
    w = tl.load(kv_weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_dw = tl.zeros([KV_BLOCK], tl.float32)
    q_column = tl.arange(0, Q_BLOCK)
    q_inside = q_column < q_size
    q_w = tl.load(q_weight + q_column, mask=q_inside, other=0.0).to(tl.float32)
    q_sum_dw = tl.zeros([Q_BLOCK], tl.float32)
    rope = tl.arange(0, ROPE_BLOCK)
    row = first.to(tl.int64)
    for _ in range(first, rows, tl.num_programs(0)):
        at = row * x_stride
        g = tl.load(dkv + row * kv_size + column, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x + at + q_size + column, mask=inside, other=0.0).to(tl.float32)
        turned = tl.load(d_rope + row * rope_size + rope, mask=rope < rope_size, other=0.0)
        if HAS_Q:
            q_g = tl.load(dq + row * q_size + q_column, mask=q_inside, other=0.0).to(tl.float32)
            q_normed = tl.load(x + at + q_column, mask=q_inside, other=0.0).to(tl.float32)
            r = tl.load(inverse_rms + 2 * row + 1)
            q_normed *= r
            q_sum_dw += q_g * q_normed
            q_g *= q_w
            result = r * (q_g - q_normed * (tl.sum(q_g * q_normed, 0) / q_size))
            tl.store(dx + at + q_column, result.to(dx.dtype.element_ty), mask=q_inside)
        r = tl.load(inverse_rms + 2 * row)
        normed *= r
        sum_dw += g * normed
        g *= w
        result = r * (g - normed * (tl.sum(g * normed, 0) / kv_size))
        tl.store(dx + at + q_size + column, result.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + at + q_size + kv_size + rope, turned, mask=rope < rope_size)
        row += tl.num_programs(0)
    start = first.to(tl.int64) * (q_size + kv_size)
    if HAS_Q:
        tl.store(dw + start + q_column, q_sum_dw, mask=q_inside)
    tl.store(dw + start + q_size + column, sum_dw, mask=inside)


@triton.jit
def _sum_rows(parts, out, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(parts + row[:, None] * size + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


def _sum(parts: Float[Tensor, "programs size"], dtype: torch.dtype) -> Float[Tensor, " size"]:
    """The sum over the programs, rounded once."""
    rows, size = parts.shape
    out = torch.empty(size, dtype=dtype, device=parts.device)
    _sum_rows[(triton.cdiv(size, 32),)](parts, out, rows, size, ROWS=64, BLOCK=32, num_warps=4)
    return out


def _launch(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (x itself without), its norm, and 1 / rms of every row. `x` may be columns of a wider array."""
    rows, size = x.shape
    y = x.new_empty(rows, size)
    total = x if delta is None else torch.empty_like(y)
    inverse_rms = x.new_empty(rows, dtype=torch.float32)
    if rows:
        added = x if delta is None else delta
        _forward[(rows,)](
            x, added, weight, total, y, inverse_rms, size, x.stride(0), eps, ADD=delta is not None, **_launch(size)
        )
    return total, y, inverse_rms


def _norm_backward(grad, extra, x, weight, inverse_rms, dx) -> Tensor:
    """Fills `dx` with the gradient of the norm's input, plus `extra` where there is one; returns the weight's."""
    rows, size = x.shape
    programs = max(min(PROGRAMS, rows), 1)
    dw = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        grad.contiguous(), grad if extra is None else extra.contiguous(), x, weight, inverse_rms, dx, dw, rows, size,
        x.stride(0), dx.stride(0), EXTRA=extra is not None, **_launch(size),
    )  # fmt: skip
    return _sum(dw, weight.dtype)


def add_norm(
    x: Float[Tensor, "n size"], delta: Float[Tensor, "n size"] | None, weight: Float[Tensor, " size"], eps: float
) -> tuple[Float[Tensor, "n size"], Float[Tensor, "n size"]]:
    """(x + delta, the norm of that). Without `delta` the first is `x` again: use it in x's place further on, and the
    gradient of both uses is one sum in the backward pass."""
    return _AddNorm.apply(x, delta, weight, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        total, y, inverse_rms = _norm(x, None if delta is None else delta.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.added = delta is not None
        return total, y

    @staticmethod
    def backward(ctx, d_total, dy):
        total, weight, inverse_rms = ctx.saved_tensors
        if dy is None:
            return d_total, d_total if ctx.added else None, None, None
        dx = torch.empty_like(total)
        dw = _norm_backward(dy, d_total, total, weight, inverse_rms, dx)
        return dx, dx if ctx.added else None, dw, None


def latent_norms(
    fused: Float[Tensor, "n q+kv+rope"],
    q_weight: Float[Tensor, " q"] | None,
    kv_weight: Float[Tensor, " kv"],
    eps: float,
) -> tuple[Float[Tensor, "n q"] | None, Float[Tensor, "n kv"], Float[Tensor, "n rope"]]:
    """The normed query latent (None where there is none), the normed key-value latent and the key's part to be rotated
    (a view), out of one projection that holds them side by side."""
    return _LatentNorms.apply(fused, q_weight, kv_weight, eps)


class _LatentNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, q_weight, kv_weight, eps):
        fused = fused.contiguous()
        n, kv_size = len(fused), len(kv_weight)
        q_size = 0 if q_weight is None else len(q_weight)
        q = None if q_weight is None else fused.new_empty(n, q_size)
        kv = fused.new_empty(n, kv_size)
        inverse_rms = fused.new_empty(n, 2, dtype=torch.float32)
        _latents[(n,)](
            fused, kv_weight if q_weight is None else q_weight, kv_weight, kv if q is None else q, kv, inverse_rms,
            q_size, kv_size, fused.shape[1], eps, **_latent_blocks(q_size, kv_size),
        )  # fmt: skip
        ctx.save_for_backward(fused, q_weight, kv_weight, inverse_rms)
        return q, kv, fused[:, q_size + kv_size :]

    @staticmethod
    def backward(ctx, dq, dkv, d_rope):
        fused, q_weight, kv_weight, inverse_rms = ctx.saved_tensors
        n, kv_size = len(fused), len(kv_weight)
        q_size = 0 if q_weight is None else len(q_weight)
        rope_size = fused.shape[1] - q_size - kv_size
        result = torch.empty_like(fused)
        programs = min(PROGRAMS, n)
        dw = torch.empty(programs, q_size + kv_size, dtype=torch.float32, device=fused.device)
        dkv = dkv.contiguous()
        _latents_backward[(programs,)](
            dkv if q_weight is None else dq.contiguous(), dkv, d_rope.contiguous(), fused,
            kv_weight if q_weight is None else q_weight, kv_weight, inverse_rms, result, dw, n, q_size, kv_size,
            rope_size, fused.shape[1], ROPE_BLOCK=triton.next_power_of_2(rope_size), **_latent_blocks(q_size, kv_size),
        )  # fmt: skip
        dw = _sum(dw, kv_weight.dtype)
        return result, None if q_weight is None else dw[:q_size], dw[q_size:], None


def _latent_blocks(q_size: int, kv_size: int) -> dict[str, int]:
    blocks = {"Q_BLOCK": triton.next_power_of_2(max(q_size, 1)), "KV_BLOCK": triton.next_power_of_2(kv_size)}
    return {"HAS_Q": q_size > 0, "num_warps": min(max(max(blocks.values()) // 256, 1), 8), **blocks}
