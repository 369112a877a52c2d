"""Float8 with fine-grained scales (DeepSeek-V3 technical report, section 3.3.2): activations in tiles of 1x128,
weights in blocks of 128x128, E4M3, one float32 scale each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TILE = 128
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


@dataclass(frozen=True)
class Quantized:
    """`values` are E4M3; a value stands for values · its scale. `scales` is [rows, ⌈columns/128⌉] for tiles along a
    row, [⌈rows/128⌉, ⌈columns/128⌉] for blocks."""

    values: Float[Tensor, "rows columns"]
    scales: Float[Tensor, "tile_rows tile_columns"]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """float32."""
        rows, columns = self.values.shape
        result = self.values.float()
        scales = self.scales.float().repeat_interleave(TILE, 1)[:, :columns]
        if len(scales) == rows:  # tiles; also blocks of a single row
            return result.mul_(scales)
        whole = rows // TILE * TILE  # a block's rows take its scales without a copy of them for every row
        result[:whole].view(-1, TILE, columns).mul_(scales[: whole // TILE, None])
        result[whole:].mul_(scales[-1])
        return result


def quantize_tiles(x: Float[Tensor, "rows columns"]) -> Quantized:
    """Tiles of 1x128 along the rows; the last of a row may be shorter. The largest magnitude of a tile becomes 448."""
    columns = x.shape[1]
    tiles = F.pad(x.float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scales = _scales(tiles.abs().amax(-1))
    values = (tiles / scales[..., None]).flatten(1)[:, :columns]
    return Quantized(_round(values), scales)


def block_scales_shape(rows: int, columns: int) -> tuple[int, int]:
    """[⌈rows/128⌉, ⌈columns/128⌉]"""
    return -(-rows // TILE), -(-columns // TILE)


def quantize_blocks(
    w: Float[Tensor, "rows columns"], keep: Float[Tensor, "block_rows block_columns"] | None = None
) -> Quantized:
    """Blocks of 128x128; those at the lower and right edge may be smaller. The largest magnitude of a block becomes
    448.

    `keep` are the scales that the weights had in FP8. A block whose largest magnitude still is between 224 and 448
    times its old scale, or 0, keeps it: weights that came from FP8, also by way of BF16, get the same bytes again,
    whatever the rule that made their scales.
    """
    rows, columns = w.shape
    padded = F.pad(w.float(), (0, -columns % TILE, 0, -rows % TILE))
    blocks = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    largest = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))  # abs() would be another copy
    scales = _scales(largest)
    if keep is not None:
        slack = 2**-8  # half of BF16's last place: what rounding may have added or taken
        ratio = largest / keep.float()
        fits = (ratio <= LARGEST * (1 + slack)) & ((ratio >= LARGEST / 2 * (1 - slack)) | (largest == 0))
        scales = torch.where(fits, keep.float(), scales)
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return Quantized(_round(values), scales)


def _scales(largest: Tensor) -> Tensor:
    # An empty tile keeps scale 1: 0/0 would be NaN. Below the least normal float32 a scale would lose its digits.
    # Divided by a tensor: by a number, a GPU multiplies with its reciprocal, and the last bit depends on the device.
    scales = largest / torch.full_like(largest, LARGEST)
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)


def _round(values: Tensor) -> Tensor:
    """Overwrites `values`."""
    # Division may give 448.00003, and casts to E4M3 differ in what they make of values out of range.
    return values.clamp_(-LARGEST, LARGEST).to(FLOAT8)
