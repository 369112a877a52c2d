"""The small layers everything else is built of: a bias-free linear map on a recipe, RMSNorm, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trainer.model.rows import swiglu_backward, swiglu_forward
from trainer.precision.recipe import Recipe, matmul


def has_kernels(x: Tensor) -> bool:
    """Whether the model computes `x` with the kernels for a GPU (triton_*.py; every floating dtype) or as plain torch
    operations."""
    return x.is_cuda


class Linear(nn.Module):
    """y = x Wᵀ in the given recipe. The weight is left uninitialized; see `V3Model.init_weights`."""

    def __init__(self, inner: int, outer: int, recipe: Recipe) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner))
        self.recipe: Recipe = recipe

    def forward(self, x: Float[Tensor, "n inner"]) -> Float[Tensor, "n outer"]:
        return matmul(x, self.weight, self.recipe)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
        return self.add(x, None)[1]

    def add(
        self, x: Float[Tensor, "n size"], delta: Float[Tensor, "n size"] | None
    ) -> tuple[Float[Tensor, "n size"], Float[Tensor, "n size"]]:
        """(x + delta, the norm of that). Without `delta` the first is `x`: where `x` is used again, use it instead;
        a GPU then sums both gradients in one pass."""
        if has_kernels(x):
            from trainer.model.kernels.triton_norm import add_norm

            return add_norm(x, delta, self.weight, self.eps)
        x = x if delta is None else x + delta
        if x.device.type == "cpu":
            return x, _RMSNormOnCPU.apply(x, self.weight, self.eps)
        return x, F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """F.rms_norm is a chain of single operations on CPU: 8 times slower forward, 10 times backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [n, 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        if x.dtype == torch.float32:
            return torch.mul(x, inverse_rms).mul_(weight)
        return (x * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # With r = 1/rms: dx = r · (g w - x r² mean(g w x)), dw = Σ g x r
        x, weight, inverse_rms = ctx.saved_tensors
        dtype = x.dtype
        x, g, w = x.float(), grad.float(), weight.float()
        product = g * x
        dw = inverse_rms.flatten() @ product
        along = (product @ w)[:, None].mul_(inverse_rms.pow(3)).div_(-x.shape[-1])
        dx = torch.mul(g, w, out=product).mul_(inverse_rms).addcmul_(x, along)
        return dx.to(dtype), dw.to(weight.dtype), None


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x). `w13` is w1 above w3, so that both are one product."""

    def __init__(self, hidden: int, intermediate: int, recipe: Recipe) -> None:
        super().__init__()
        self.w13 = Linear(hidden, 2 * intermediate, recipe)
        self.w2 = Linear(intermediate, hidden, recipe)

    def forward(self, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        return self.w2(swiglu(self.w13(x)))


def swiglu(gate_and_up: Float[Tensor, "n two_wide"]) -> Float[Tensor, "n wide"]:
    """silu(gate) · up of [gate, up]. Keeps its input only; the rest is computed again in the backward pass."""
    if has_kernels(gate_and_up):
        from trainer.model.kernels import gpu_moe

        return gpu_moe.swiglu(gate_and_up)
    return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up):
        ctx.save_for_backward(gate_and_up)
        return swiglu_forward(gate_and_up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_backward(*ctx.saved_tensors, grad)
