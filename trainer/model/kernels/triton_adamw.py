"""AdamW on a GPU in one pass: every byte of master, moments, gradient and weight is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int16
from torch import Tensor

BLOCK = 1024  # elements of a program: 8 a thread, 16 bytes at a time in BF16


def adamw(
    weight: Tensor | None,
    master: Float[Tensor, " n"] | Int16[Tensor, " n"],
    exp_avg: Float[Tensor, " n"],
    exp_avg_sq: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    norm: Float[Tensor, ""],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> None:
    """Update number `step` (from 1) of one tensor in place: algorithm 2 of arXiv 1711.05101 on the gradient clipped to
    the global norm `max_norm`; the result is also rounded into `weight` unless that is None. `norm`, the gradient's
    global norm, is read on the GPU: nobody waits for it, and where it is not finite nothing is written.

    A `master` in int16 is what a BF16 `weight` lacks of it (trainer.masters): two bytes a parameter less to keep and to
    move. Else any floating dtypes; arithmetic in float32; all tensors contiguous, of one size, on one GPU."""
    tensors = [t for t in (weight, master, exp_avg, exp_avg_sq, grad) if t is not None]
    if any(t.numel() != master.numel() or not t.is_contiguous() for t in tensors):
        raise ValueError(f"adamw: expected contiguous tensors of one size, found {[list(t.shape) for t in tensors]}")
    n = master.numel()
    if not n:
        return
    with torch.cuda.device_of(master):
        _adamw[(triton.cdiv(n, BLOCK),)](
            master if weight is None else weight,
            master,
            exp_avg,
            exp_avg_sq,
            grad,
            norm,
            n,
            float(max_norm),
            float(lr),
            float(lr * weight_decay),
            float(beta1),
            float(beta2),
            float(eps),
            float(1 / (1 - beta1**step)),
            float((1 - beta2**step) ** -0.5),
            ROUND=weight is not None,
            SPLIT=master.dtype == torch.int16,
            BLOCK=BLOCK,
            num_warps=4,
        )


@triton.jit
def _adamw(
    weight, master, exp_avg, exp_avg_sq, grad, norm, n, max_norm, lr, lr_decay, beta1, beta2, eps,
    correction, root_correction, ROUND: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.load(norm)
    if total < float("inf"):  # false for NaN too
        scale = tl.where(total > max_norm, max_norm / (total + 1e-6), 1.0)
        # 64 bits: a rank's stacked experts can have more than 2^31 elements
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        if SPLIT:
            upper = tl.load(weight + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
            rest = tl.load(master + at, mask=inside, other=0).to(tl.int32)
            p = ((upper << 16) + rest).to(tl.float32, bitcast=True)
        else:
            p = tl.load(master + at, mask=inside, other=0.0).to(tl.float32)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= lr_decay * p
        p -= lr * (m * correction) / (tl.sqrt(v) * root_correction + eps)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        if SPLIT:
            bits = p.to(tl.int32, bitcast=True)
            bits += tl.where((bits & 0xFFFF) == 0x8000, 1, 0)
            upper = (bits + 0x8000) >> 16
            tl.store(master + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
            tl.store(weight + at, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store(master + at, p.to(master.dtype.element_ty), mask=inside)
            if ROUND:
                tl.store(weight + at, p.to(weight.dtype.element_ty), mask=inside)
