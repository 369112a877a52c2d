"""The FP8 recipe on Hopper: the three products of a Linear through cuBLAS's block-scaled FP8 (torch's `scaled_mm`),
activations and gradients in tiles of 1x128, weights in blocks of 128x128 (DeepSeek-V3 technical report, section 3.3).
emulated.py is its oracle. cuBLAS sums 128 products in the tensor core before it promotes them to float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ALIGNMENT = 16  # of both sides of a weight, in values: what cuBLAS's FP8 takes


def missing() -> str | None:
    """Why this installation cannot compute the recipe, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} without torch.nn.functional.scaled_mm (2.10 has it)"
    if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"torch for CUDA {torch.version.cuda}, whose cuBLAS has no block scales (12.9 has)"
    return None


def matmul(x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"]) -> Float[Tensor, "n outer"]:
    """x wᵀ with both operands in FP8; so are those of both products of the backward pass. The input is kept in FP8
    only. Errors: ValueError where a side of the weight is no multiple of 16."""
    if any(side % ALIGNMENT for side in w.shape):
        raise ValueError(
            f"found a weight of {list(w.shape)}, expected multiples of {ALIGNMENT}: recipe 'fp8' needs them; use 'bf16'"
        )
    return _Matmul.apply(x, w)


def product(x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"], turned: bool = False) -> Tensor:
    """x wᵀ, or x w."""
    from trainer.precision.triton_quantize import blocks, tiles

    return _product(tiles(x)[0], blocks(w)[1 if turned else 0], "block", x.dtype)[: len(x)]


def outer(grad: Float[Tensor, "n outer"], x: Float[Tensor, "n inner"]) -> Float[Tensor, "outer inner"]:
    """gradᵀ x, both in tiles of 128 rows."""
    from trainer.precision.triton_quantize import tiles

    a, b = (tiles(t, along=False, across=True)[1] for t in (grad, x))
    return _product(a, b, "tile", grad.dtype)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        from trainer.precision.triton_quantize import blocks, tiles

        x8, _ = tiles(x)
        w8, turned = blocks(w)
        ctx.save_for_backward(x8.values, x8.scales, turned.values, turned.scales)
        ctx.rows, ctx.x_dtype, ctx.w_dtype = len(x), x.dtype, w.dtype
        return _product(x8, w8, "block", x.dtype)[: len(x)]

    @staticmethod
    def backward(ctx, grad):
        from trainer.precision.triton_quantize import Operand, tiles, turned_tiles

        x_values, x_scales, w_values, w_scales = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        straight, turned = tiles(grad, along=need_x, across=need_w)
        dx = dw = None
        if need_x:
            dx = _product(straight, Operand(w_values, w_scales), "block", ctx.x_dtype)[: ctx.rows]
        if need_w:
            over_tokens = turned_tiles(Operand(x_values, x_scales), ctx.rows)
            dw = _product(turned, over_tokens, "tile", ctx.w_dtype)
        return dx, dw


def _product(a, b, b_scaled_by: str, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """a bᵀ of two `Operand`s; `a` is in tiles."""
    kinds = F.ScalingType
    kind = kinds.BlockWise128x128 if b_scaled_by == "block" else kinds.BlockWise1x128
    return F.scaled_mm(
        a.values, b.values.t(), a.scales.t(), kinds.BlockWise1x128, b.scales.t(), kind, output_dtype=dtype
    )
