"""Exponential noise of many requests in one launch: every row's from a seed and a counter of its own.

A request's noise is Philox4x32-10 (Salmon et al., SC 2011) of its seed, the number of its draw and the column, so it
depends neither on the batch nor on its place in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_BLOCK = 1024
_ROUND = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # Philox's multipliers, and what a round adds to the key


@triton.jit
def _exponential(bits):
    """-log(1 - u) for u = (bits + 1/2) / 2^32, exact to float32's precision where u is small: small noise decides."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.where(u < 0.01, u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25))), -tl.log(1 - u))


@triton.jit
def _fill(noise, table, count, width, quarter, stride, BLOCK: tl.constexpr):
    """Four columns of a row from each call of Philox, a quarter of the row apart."""
    place = tl.program_id(0)
    row = tl.load(table + place)
    seed = tl.load(table + count + place)
    draw = tl.load(table + 2 * count + place)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = at * 0
    low, high = zero + (draw & 0xFFFFFFFF), zero + (draw >> 32)
    a, b, c, d = tl.philox(seed, at.to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32), zero.to(tl.uint32))
    first = noise + row * stride + at
    inside = at < quarter
    tl.store(first, _exponential(a), mask=inside)
    tl.store(first + quarter, _exponential(b), mask=inside & (at + quarter < width))
    tl.store(first + 2 * quarter, _exponential(c), mask=inside & (at + 2 * quarter < width))
    tl.store(first + 3 * quarter, _exponential(d), mask=inside & (at + 3 * quarter < width))


def fill_rows(
    noise: Float[Tensor, "rows width"], rows: Sequence[int], seeds: Sequence[int], draws: Sequence[int]
) -> None:
    """Fills the given rows with standard exponential noise. `draws` count a request's calls; seeds are taken modulo
    2^64."""
    signed = [(seed & (1 << 64) - 1) - (seed >> 63 & 1) * (1 << 64) for seed in seeds]
    on_gpu = noise.is_cuda
    table = torch.tensor([*rows, *signed, *draws], dtype=torch.int64, pin_memory=on_gpu)
    width = noise.shape[1]
    quarter = -(-width // 4)
    _fill[(len(rows), triton.cdiv(quarter, _BLOCK))](
        noise, table.to(noise.device, non_blocking=True), len(rows), width, quarter, noise.stride(0), _BLOCK
    )


def expected_row(seed: int, draw: int, width: int) -> Float[np.ndarray, " width"]:
    """What `fill_rows` fills a row with, in numpy and float64."""
    quarter = -(-width // 4)
    counter = [np.arange(quarter, dtype=np.uint64)]
    counter += [np.full(quarter, word, np.uint64) for word in (draw & 0xFFFFFFFF, draw >> 32, 0)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        products = [np.uint64(factor) * part for factor, part in zip(_ROUND[0], counter[::2], strict=True)]
        counter = [
            (products[1] >> shift) ^ counter[1] ^ key[0], products[1] & low,
            (products[0] >> shift) ^ counter[3] ^ key[1], products[0] & low,
        ]  # fmt: skip
        key = [(part + np.uint64(step)) & low for part, step in zip(key, _ROUND[1], strict=True)]
    bits = np.concatenate(counter)[:width].astype(np.float64)
    return -np.log1p(-(bits + 0.5) / 2**32)
