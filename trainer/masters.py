"""Float32 masters of BF16 weights in 16 bits more: what rounding took from them.

A weight is its master rounded to nearest, so the master's bits are the weight's, shifted, plus a number from -32767 to
32767. Halfway between two weights the number would not tell which of the two the weight is; there a master is taken
one step of float32 (2^-24 of it) further from zero. `trainer.model.kernels.triton_adamw` does the same in its kernel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int16
from torch import Tensor


def join(weight: Float[Tensor, "*n"], rest: Int16[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The master."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(master: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Int16[Tensor, "*n"]]:
    """The weight and the rest."""
    bits = master.contiguous().view(torch.int32)
    bits = bits + ((bits & 0xFFFF) == 0x8000).int()
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)
