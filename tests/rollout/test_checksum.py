"""The checksum's kernel for a GPU, interpreted on the CPU: the same numbers as the plain operations."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def tensors() -> list[torch.Tensor]:
    """Of all lengths modulo a word, longer than a program reads, and empty. Each begins on a word."""
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 3, 8, 13, 4095, 8 * 1024 * 16, 8 * 1024 * 16 + 5, 300_001]
    made = [torch.randint(256, (n + 8,), dtype=torch.uint8, generator=generator)[:n] for n in lengths]
    return [*made, torch.randn(33, 7, generator=generator).bfloat16(), torch.randn(3, generator=generator)]


def check() -> None:
    from rollout.transport.checksum import checksum
    from rollout.transport.triton_checksum import Launch, readable

    many = tensors()
    assert all(readable(tensor) for tensor in many)
    assert [n % (1 << 64) for n in Launch(many)().tolist()] == [checksum(tensor) for tensor in many]


def test_the_kernel_finds_the_same_numbers():
    """In a process of its own: Triton reads the variable when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.rollout.test_checksum import check; check()"],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
