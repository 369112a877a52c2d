"""Quantization for the FP8 recipe on a GPU: the same values as quantize.py, bit for bit, in one pass over the operand,
in the layouts that torch's `scaled_mm` takes, and where a product of the backward pass needs it turned as well."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from trainer.precision.quantize import FLOAT8, TILE


@dataclass(frozen=True)
class Operand:
    """E4M3 values in rows of the products' common dimension, and their scales: by tile [K/128, rows], or by block
    [rows/128, K/128 up to a multiple of 4, as cuBLAS reads them]."""

    values: Float[Tensor, "rows K"]
    scales: Float[Tensor, "a b"]


@triton.jit
def _scale(largest):
    scale = tl.div_rn(largest, 448.0)
    return tl.where(scale < 1.1754943508222875e-38, 1.0, scale)  # an empty tile keeps scale 1


@triton.jit
def _clamped(value):
    # Not a number stays so: a broken gradient must not become a finite one.
    value = tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)


# Triton compiles a kernel of its own where an integer is 1. That of one row turned its tiles over wrongly on an H100
# (Triton 3.6; the same code with 4 rows is right), so the number of rows is no reason for one.
@triton.jit(do_not_specialize=["rows"])
def _tiles(
    x, x_scales, values, scales, turned, turned_scales, rows, columns, x_stride, padded, SCALED: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    r = block_row.to(tl.int64) * TILE + tl.arange(0, TILE)
    c = block_column.to(tl.int64) * TILE + tl.arange(0, TILE)
    in_columns = c < columns
    inside = (r < rows)[:, None] & in_columns[None, :]
    value = tl.load(x + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(x_scales + block_column * padded + r)[:, None]
    if ALONG:
        scale = _scale(tl.max(tl.abs(value), 1))
        rounded = _clamped(tl.div_rn(value, scale[:, None])).to(values.dtype.element_ty)
        tl.store(values + r[:, None] * columns + c[None, :], rounded, mask=in_columns[None, :])
        tl.store(scales + block_column * padded + r, scale)
    if ACROSS:
        scale = _scale(tl.max(tl.abs(value), 0))
        rounded = _clamped(tl.div_rn(value, scale[None, :])).to(turned.dtype.element_ty)
        tl.store(turned + c[:, None] * padded + r[None, :], tl.trans(rounded), mask=in_columns[:, None])
        tl.store(turned_scales + block_row * columns + c, scale, mask=in_columns)


@triton.jit(do_not_specialize=["rows"])
def _blocks(
    w, values, scales, turned, turned_scales, rows, columns, scale_stride, turned_scale_stride, TILE: tl.constexpr
):
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    r = block_row.to(tl.int64) * TILE + tl.arange(0, TILE)
    c = block_column.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    value = tl.load(w + r[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.max(tl.abs(value), 1), 0))
    rounded = _clamped(tl.div_rn(value, scale)).to(values.dtype.element_ty)
    tl.store(values + r[:, None] * columns + c[None, :], rounded, mask=inside)
    tl.store(turned + c[:, None] * rows + r[None, :], tl.trans(rounded), mask=tl.trans(inside))
    tl.store(scales + block_row * scale_stride + block_column, scale)
    tl.store(turned_scales + block_column * turned_scale_stride + block_row, scale)


@triton.jit
def _many_blocks(
    weights, values, scales, rows, columns, first_of, tensor_of, a_weight, a_value, a_scale, TILE: tl.constexpr
):
    # The last three are there for their types.
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    height, width = tl.load(rows + tensor), tl.load(columns + tensor)
    across = tl.cdiv(width, TILE)
    place = program - tl.load(first_of + tensor)
    block_row, block_column = place // across, place % across
    r = block_row * TILE + tl.arange(0, TILE)
    c = block_column * TILE + tl.arange(0, TILE)
    at = r[:, None] * width + c[None, :]
    inside = (r < height)[:, None] & (c < width)[None, :]
    w = tl.load(weights + tensor).to(tl.pointer_type(a_weight.dtype.element_ty))
    value = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.max(tl.abs(value), 1), 0))
    v = tl.load(values + tensor).to(tl.pointer_type(a_value.dtype.element_ty))
    tl.store(v + at, _clamped(tl.div_rn(value, scale)).to(a_value.dtype.element_ty), mask=inside)
    tl.store(tl.load(scales + tensor).to(tl.pointer_type(a_scale.dtype.element_ty)) + place, scale)


def tiles(
    x: Float[Tensor, "rows columns"], along: bool = True, across: bool = False
) -> tuple[Operand | None, Operand | None]:
    """`x` with the rows padded by zeros to a multiple of 128: in tiles of 1x128 along its rows ([rows, columns]), and
    turned ([columns, rows]) in tiles of 128 rows each. What is not asked for is None."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return _quantize(x, None, x.shape[0], along, across)


def turned_tiles(x: Operand, rows: int) -> Operand:
    """The dequantized values of the first `rows` rows of an operand in tiles, turned and quantized along its rows."""
    return _quantize(x.values, x.scales, rows, along=False, across=True)[1]


def _quantize(x, scales, rows, along, across):
    columns, padded = x.shape[1], -(-rows // TILE) * TILE
    blocks = (padded // TILE, -(-columns // TILE))

    def operand(wanted: bool, height: int, width: int, many: int) -> Operand | None:
        if not wanted:
            return None
        return Operand(x.new_empty(height, width, dtype=FLOAT8), x.new_empty(many, height, dtype=torch.float32))

    straight = operand(along, padded, columns, blocks[1])
    turned = operand(across, columns, padded, blocks[0])
    any_tensor = x  # stands for what a flag leaves unread
    _tiles[blocks](
        x, any_tensor if scales is None else scales,
        straight.values if along else any_tensor, straight.scales if along else any_tensor,
        turned.values if across else any_tensor, turned.scales if across else any_tensor,
        rows, columns, x.stride(0), padded, SCALED=scales is not None, ALONG=along, ACROSS=across, TILE=TILE,
    )  # fmt: skip
    return straight, turned


def blocks(w: Float[Tensor, "rows columns"]) -> tuple[Operand, Operand]:
    """A weight in blocks of 128x128, as it is and turned."""
    w = w.contiguous()
    rows, columns = w.shape
    grid = (-(-rows // TILE), -(-columns // TILE))
    strides = [-(-count // 4) * 4 for count in (grid[1], grid[0])]
    straight = Operand(w.new_empty(rows, columns, dtype=FLOAT8), w.new_zeros(grid[0], strides[0], dtype=torch.float32))
    turned = Operand(w.new_empty(columns, rows, dtype=FLOAT8), w.new_zeros(grid[1], strides[1], dtype=torch.float32))
    _blocks[grid](
        w, straight.values, straight.scales, turned.values, turned.scales, rows, columns, *strides, TILE=TILE
    )
    return straight, turned


def blocks_into(weights: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Writes what `trainer.precision.quantize.quantize_blocks` makes of each weight [rows, columns] (all of one dtype)
    to where it is wanted: E4M3 [rows, columns], and a float32 scale a block [⌈rows/128⌉, ⌈columns/128⌉]. One launch
    for all; whatever memory they lie in, each is contiguous."""
    if not weights:
        return
    device = weights[0].device
    sources = [w.contiguous() for w in weights]
    counts = [s.numel() for s in scales]
    firsts = itertools.accumulate(counts, initial=0)
    told = torch.tensor(
        [
            (w.data_ptr(), v.data_ptr(), s.data_ptr(), *w.shape, first, count)
            for w, v, s, first, count in zip(sources, values, scales, firsts, counts, strict=False)
        ]
    )
    # Each row begins on 16 bytes: Triton compiles anew for other alignments.
    *table, repeats = F.pad(told.T.contiguous(), (0, len(sources) % 2)).to(device)
    numbers = torch.arange(len(repeats), device=device)
    tensor_of = torch.repeat_interleave(numbers, repeats, output_size=sum(counts))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _many_blocks[(sum(counts),)](*table, tensor_of, sources[0], values[0], scales[0], TILE=TILE, num_warps=8)
