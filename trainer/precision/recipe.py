"""The seam of precision: every heavy product of the model goes through these functions.

Embedding, head, router, norms and the attention itself stay outside, as in DeepSeek-V3 (technical report, section
3.3.1): they run in the weights' dtype, router and norms in float32.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.precision import emulated, fp8

log = logging.getLogger(__name__)

Recipe = Literal["bf16", "fp8", "fp8_emulated"]


def check_recipe(recipe: str) -> None:
    """Raises ValueError for an unknown recipe, RuntimeError for one that this installation cannot compute."""
    if recipe not in get_args(Recipe):
        raise ValueError(f"found recipe {recipe!r}, expected one of {', '.join(get_args(Recipe))}")
    if recipe == "fp8":
        if found := fp8.missing():
            raise RuntimeError(
                f"recipe 'fp8' needs a Hopper GPU and torch's block-scaled products; found {found}. "
                "Use 'bf16', or 'fp8_emulated' for the same rounding in float32 arithmetic (slow)"
            )
        _say_what_stays_bf16()


@functools.cache
def _say_what_stays_bf16() -> None:
    log.warning("recipe 'fp8': every Linear computes in FP8, the routed experts' grouped products in BF16 (torch)")


def matmul(x: Float[Tensor, "*n inner"], w: Float[Tensor, "outer inner"], recipe: Recipe) -> Float[Tensor, "*n outer"]:
    """x wᵀ, with gradients. `bf16` computes in the operands' own dtype (float32 weights: a float32 product)."""
    if recipe == "bf16":
        return F.linear(x, w)
    return _of(recipe).matmul(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])


# The products of `trainer.model.experts`, which makes the gradients itself. Each multiplies what the recipe makes of
# its operands; `turned` multiplies by w instead of wᵀ.


def product(
    x: Float[Tensor, "n inner"], w: Float[Tensor, "outer inner"], recipe: Recipe, turned: bool = False
) -> Float[Tensor, "n outer"]:
    """x wᵀ."""
    if recipe == "bf16":
        return x @ w if turned else F.linear(x, w)
    return _of(recipe).product(x, w, turned)


def outer(grad: Float[Tensor, "n outer"], x: Float[Tensor, "n inner"], recipe: Recipe) -> Float[Tensor, "outer inner"]:
    """gradᵀ x, the gradient of a weight."""
    return grad.T @ x if recipe == "bf16" else _of(recipe).outer(grad, x)


def grouped_product(
    x: Float[Tensor, "rows inner"],
    w: Float[Tensor, "experts outer inner"],
    ends: Int[Tensor, " experts"],
    recipe: Recipe,
    turned: bool = False,
) -> Float[Tensor, "rows outer"]:
    """Row r times the transposed weight of the expert whose rows end after r: expert e owns the rows
    [ends[e - 1], ends[e]); ends are int32. Rows behind the last expert's are undefined. `fp8` computes these in BF16:
    torch has no block-scaled grouped product on Hopper."""
    if not len(x):
        return x.new_empty(0, w.shape[2 if turned else 1])
    if recipe == "fp8_emulated":
        return emulated.grouped_product(x, w, ends, turned)
    return torch._grouped_mm(x, w if turned else w.transpose(1, 2), offs=ends)


def grouped_outer(
    grad: Float[Tensor, "rows outer"], x: Float[Tensor, "rows inner"], ends: Int[Tensor, " experts"], recipe: Recipe
) -> Float[Tensor, "experts outer inner"]:
    """gradᵀ x over every expert's rows, zeros for an expert without."""
    if not len(x):
        return x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    if recipe == "fp8_emulated":
        return emulated.grouped_outer(grad, x, ends)
    return torch._grouped_mm(grad.T, x, offs=ends)


def _of(recipe: Recipe):
    if recipe == "fp8_emulated":
        return emulated
    if recipe == "fp8":
        return fp8
    raise ValueError(f"found recipe {recipe!r}, expected one of {', '.join(get_args(Recipe))}")
