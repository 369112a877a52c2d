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
    return dw.sum(0).to(weight.dtype)


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
        ctx.set_materialize_grads(False)
        q_size, kv_size = 0 if q_weight is None else len(q_weight), len(kv_weight)
        q = q_inverse = None
        if q_weight is not None:
            _, q, q_inverse = _norm(fused[:, :q_size], None, q_weight, eps)
        _, kv, kv_inverse = _norm(fused[:, q_size : q_size + kv_size], None, kv_weight, eps)
        ctx.save_for_backward(fused, q_weight, kv_weight, q_inverse, kv_inverse)
        return q, kv, fused[:, q_size + kv_size :].clone()

    @staticmethod
    def backward(ctx, dq, dkv, d_rope):
        fused, q_weight, kv_weight, q_inverse, kv_inverse = ctx.saved_tensors
        q_size, kv_size = 0 if q_weight is None else len(q_weight), len(kv_weight)
        parts = (slice(0, q_size), slice(q_size, q_size + kv_size), slice(q_size + kv_size, fused.shape[1]))
        result, d_weights = torch.empty_like(fused), [None, None]
        norms = ((dq, q_weight, q_inverse), (dkv, kv_weight, kv_inverse))
        for i, (grad, weight, inverse) in enumerate(norms):
            if weight is None:
                continue
            if grad is None:
                result[:, parts[i]] = 0
                continue
            d_weights[i] = _norm_backward(grad, None, fused[:, parts[i]], weight, inverse, result[:, parts[i]])
        result[:, parts[2]] = 0 if d_rope is None else d_rope
        return result, *d_weights, None
