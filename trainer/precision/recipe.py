"""The seam of precision: every heavy product of the model goes through these two functions.

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
    """x wᵀ. `bf16` computes in the operands' own dtype (float32 weights: a float32 product)."""
    if recipe == "bf16":
        return F.linear(x, w)
    if recipe == "fp8_emulated":
        return emulated.matmul(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    if recipe == "fp8":
        return fp8.matmul(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    raise ValueError(f"found recipe {recipe!r}, expected one of {', '.join(get_args(Recipe))}")


def grouped_matmul(
    x: Float[Tensor, "rows inner"],
    w: Float[Tensor, "experts outer inner"],
    offsets: Int[Tensor, " experts"],
    recipe: Recipe,
) -> Float[Tensor, "rows outer"]:
    """Row r times the transposed weight of the expert whose rows end after r: expert e owns the rows
    [offsets[e - 1], offsets[e]); offsets are int32. `fp8` computes these in BF16: torch has no block-scaled grouped
    product on Hopper."""
    if recipe in ("bf16", "fp8"):
        return torch._grouped_mm(x, w.transpose(1, 2), offs=offsets)
    if recipe == "fp8_emulated":
        return emulated.grouped_matmul(x, w, offsets)
    raise ValueError(f"found recipe {recipe!r}, expected one of {', '.join(get_args(Recipe))}")
