"""The seam of precision: every heavy product of the model goes through these two functions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Recipe = Literal["bf16", "fp8", "fp8_emulated"]


def check_recipe(recipe: str) -> None:
    if recipe not in get_args(Recipe):
        raise ValueError(f"found recipe {recipe!r}, expected one of {', '.join(get_args(Recipe))}")


def matmul(x: Float[Tensor, "*n inner"], w: Float[Tensor, "outer inner"], recipe: Recipe) -> Float[Tensor, "*n outer"]:
    """x wᵀ. `bf16` computes in the operands' own dtype (float32 weights: a float32 product)."""
    if recipe == "bf16":
        return F.linear(x, w)
    raise NotImplementedError(f"recipe {recipe} is not built yet: use 'bf16'")


def grouped_matmul(
    x: Float[Tensor, "rows inner"],
    w: Float[Tensor, "experts outer inner"],
    offsets: Int[Tensor, " experts"],
    recipe: Recipe,
) -> Float[Tensor, "rows outer"]:
    """Row r times the transposed weight of the expert whose rows end after r: expert e owns the rows
    [offsets[e - 1], offsets[e])."""
    if recipe == "bf16":
        return torch._grouped_mm(x, w.transpose(1, 2), offs=offsets)
    raise NotImplementedError(f"recipe {recipe} is not built yet: use 'bf16'")
