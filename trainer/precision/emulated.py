"""The FP8 recipe of DeepSeek-V3 (technical report, section 3.3) in float32 arithmetic, on any device: the operands are
rounded as the real recipe rounds them, products are summed in float32. The oracle for fast kernels, and slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.precision.quantize import Quantized, quantize_blocks, quantize_tiles


def matmul(x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"]) -> Float[Tensor, "n outer"]:
    """x wᵀ with both operands in FP8; so are those of both products of the backward pass.

    The input is kept in FP8 only. For the weight's gradient, whose sum runs over tokens, it is dequantized and
    quantized again in tiles of 128 tokens; so is the output's gradient, from its full precision.
    """
    return _Matmul.apply(x, w)


def product(x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"], turned: bool = False) -> Tensor:
    """x wᵀ, or x w: `x` in tiles along its rows, `w` in blocks."""
    w8 = quantize_blocks(w).dequantize()
    return (quantize_tiles(x).dequantize() @ (w8 if turned else w8.T)).to(x.dtype)


def outer(grad: Float[Tensor, "n outer"], x: Float[Tensor, "n inner"]) -> Float[Tensor, "outer inner"]:
    """gradᵀ x, both in tiles of 128 rows."""
    return (quantize_tiles(grad.T).dequantize() @ quantize_tiles(x.T).dequantize().T).to(grad.dtype)


def grouped_product(
    x: Float[Tensor, "rows inner"], w: Float[Tensor, "experts outer inner"], ends: Int[Tensor, " experts"], turned: bool
) -> Float[Tensor, "rows outer"]:
    """`product` of every expert's rows, [ends[e - 1], ends[e]), with its weight; zeros behind the last's."""
    parts = [product(x[rows], w[e], turned) for e, rows in enumerate(_ranges(ends))]
    return F.pad(torch.cat(parts), (0, 0, 0, len(x) - int(ends[-1])))


def grouped_outer(
    grad: Float[Tensor, "rows outer"], x: Float[Tensor, "rows inner"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "experts outer inner"]:
    """`outer` of every expert's rows: tiles of tokens start at every expert anew."""
    return torch.stack([outer(grad[rows], x[rows]) for rows in _ranges(ends)])


def _ranges(ends: Int[Tensor, " experts"]) -> list[slice]:
    found = ends.tolist()
    return [slice(start, end) for start, end in zip([0, *found[:-1]], found, strict=True)]


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        x8, w8 = quantize_tiles(x), quantize_blocks(w)
        ctx.save_for_backward(x8.values, x8.scales, w8.values, w8.scales)
        ctx.x_dtype, ctx.w_dtype = x.dtype, w.dtype
        return (x8.dequantize() @ w8.dequantize().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x_values, x_scales, w_values, w_scales = ctx.saved_tensors
        x8, w8 = Quantized(x_values, x_scales), Quantized(w_values, w_scales)
        dx = quantize_tiles(grad).dequantize() @ w8.dequantize()
        return dx.to(ctx.x_dtype), outer(grad, x8.dequantize()).to(ctx.w_dtype)
