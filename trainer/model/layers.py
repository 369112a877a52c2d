"""The two small layers everything else is built of: a bias-free linear map on a recipe, and RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trainer.precision.recipe import Recipe, matmul


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

    def forward(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x). `w13` is w1 above w3, so that both are one product."""

    def __init__(self, hidden: int, intermediate: int, recipe: Recipe) -> None:
        super().__init__()
        self.w13 = Linear(hidden, 2 * intermediate, recipe)
        self.w2 = Linear(intermediate, hidden, recipe)

    def forward(self, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        return self.w2(swiglu(self.w13(x)))


def swiglu(gate_and_up: Float[Tensor, "n two_wide"]) -> Float[Tensor, "n wide"]:
    """silu(gate) · up of [gate, up]."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
