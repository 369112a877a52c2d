"""The FP8 recipe's Triton kernels in Triton's interpreter, on a CPU: layouts, edges, scales. Rounding is for a GPU
(test_fp8_gpu.py): the interpreter of Triton 3.9 loses the carry into E4M3's exponent, so all values here are exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SHAPES = [(300, 200), (128, 128), (5, 576)]


def exact(rows: int, columns: int) -> torch.Tensor:
    """Products of an E4M3 value and a power of two of its 128x128 block, in BF16; every tile of 1x128 or 128x1 has a
    448, so that its scale is that power."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.arange(0x08, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # normal, positive
    x = codes[torch.randint(len(codes), (rows, columns), generator=generator)]
    x[::128], x[:, ::128] = 448, 448
    x *= torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    power = torch.randint(-9, 9, (-(-rows // 128), -(-columns // 128)), generator=generator)
    factor = torch.exp2(power.float()).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (x * factor[:rows, :columns]).bfloat16()


def check(rows: int, columns: int) -> None:
    from trainer.precision.quantize import quantize_blocks, quantize_tiles
    from trainer.precision.triton_quantize import blocks, tiles, turned_tiles

    x, padded = exact(rows, columns), -(-rows // 128) * 128
    whole = torch.zeros(padded, columns)
    whole[:rows] = x.float()
    straight, turned = tiles(x, along=True, across=True)
    oracle, oracle_turned = quantize_tiles(whole), quantize_tiles(whole.T.contiguous())
    assert torch.equal(oracle.dequantize(), whole), "the operand is not exact"
    for found, expected in (
        (straight, oracle),
        (turned, oracle_turned),
        (turned_tiles(straight, rows), oracle_turned),
        (tiles(x.T.contiguous().T)[0], oracle),  # of any layout
    ):
        assert torch.equal(found.values.float(), expected.values.float())
        assert torch.equal(found.scales.t(), expected.scales) and found.scales.is_contiguous()
    expected = quantize_blocks(x)
    as_it_is, transposed = blocks(x)
    assert torch.equal(as_it_is.values.float(), expected.values.float())
    assert torch.equal(transposed.values.float(), expected.values.float().t())
    for found, scales in ((as_it_is.scales, expected.scales), (transposed.scales, expected.scales.t())):
        assert found.shape[1] % 4 == 0 and torch.equal(found[:, : scales.shape[1]], scales)
        assert not found[:, scales.shape[1] :].any()


def check_many() -> None:
    for count in (2, len(SHAPES)):  # an even number needs no padding of the kernel's tables, an odd one does
        weights = [exact(*shape) for shape in SHAPES[:count]]
        check_launch(weights)


def check_launch(weights: list[torch.Tensor]) -> None:
    from trainer.precision.quantize import block_scales_shape, quantize_blocks
    from trainer.precision.triton_quantize import blocks_into

    values = [torch.zeros(w.shape, dtype=torch.float8_e4m3fn) for w in weights]
    scales = [torch.zeros(block_scales_shape(*w.shape)) for w in weights]
    blocks_into([weights[0], weights[1].T.contiguous().T, *weights[2:]], values, scales)
    for w, v, s in zip(weights, values, scales, strict=True):
        expected = quantize_blocks(w)
        assert torch.equal(v.float(), expected.values.float()) and torch.equal(s, expected.scales)


def test_operands_lie_as_the_products_take_them():
    run(f"from tests.trainer.test_triton_quantize import check\nfor shape in {SHAPES}: check(*shape)")


def test_many_weights_of_one_launch_are_quantized_as_each_alone():
    run("from tests.trainer.test_triton_quantize import check_many\ncheck_many()")


def run(program: str) -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
