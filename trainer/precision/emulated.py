"""The FP8 recipe of DeepSeek-V3 (technical report, section 3.3) in float32 arithmetic, on any device: the operands are
rounded as the real recipe rounds them, products are summed in float32. The oracle for fast kernels, and slow."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.precision.quantize import Quantized, quantize_blocks, quantize_tiles


def matmul(x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"]) -> Float[Tensor, "n outer"]:
    """x wᵀ with both operands in FP8; so are those of both products of the backward pass.

    The input is kept in FP8 only. For the weight's gradient, whose sum runs over tokens, it is dequantized and
    quantized again in tiles of 128 tokens; so is the output's gradient, from its full precision.
    """
    return _Matmul.apply(x, w)


def grouped_matmul(
    x: Float[Tensor, "rows inner"], w: Float[Tensor, "experts outer inner"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "rows outer"]:
    """Rows [offsets[e - 1], offsets[e]) times the transposed weight e; tiles of tokens start at every expert anew."""
    ends = offsets.tolist()
    if ends[-1] != len(x):
        raise ValueError(f"offsets end at {ends[-1]}, expected the {len(x)} rows of x")
    starts = [0, *ends[:-1]]
    return torch.cat([matmul(x[s:e], w[i]) for i, (s, e) in enumerate(zip(starts, ends, strict=True))])


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
        over_tokens = [quantize_tiles(t.T).dequantize() for t in (grad, x8.dequantize())]
        dw = over_tokens[0] @ over_tokens[1].T
        return dx.to(ctx.x_dtype), dw.to(ctx.w_dtype)
