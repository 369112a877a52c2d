"""Noise for the rows of seeded requests, all in one launch: the kernel, interpreted on the CPU, and what vLLM's sampler
does with it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

WIDTH = 3001  # several blocks and no multiple of four


class Stream:
    """What the sampler asks of a CUDA device's generator; a CPU's has no offset."""

    def __init__(self, seed: int):
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def rows_are_those_of_seed_and_draw() -> None:
    from rollout.vllm.triton_noise import expected_row, fill_rows

    given = {4: (7, 0), 0: ((1 << 63) + 12345, 4), 2: ((1 << 62) + 1, (1 << 33) + 8)}
    noise = torch.full((5, WIDTH), -1.0)
    fill_rows(noise, list(given), [seed for seed, _ in given.values()], [draw for _, draw in given.values()])
    for row, (seed, draw) in given.items():
        np.testing.assert_allclose(noise[row].double().numpy(), expected_row(seed, draw, WIDTH), rtol=1e-4)
    assert (noise[[1, 3]] == -1.0).all()


def tokens_follow_the_probabilities() -> None:
    """Of 2,000 requests, within five standard deviations; the rare token too, which only small noise can choose."""
    from vllm.v1.sample.ops import topk_topp_sampler

    from rollout.vllm.sampling import _together

    count, probs = 2_000, torch.tensor([0.6, 0.0, 0.3, 0.09, 0.01])
    chosen = _together(topk_topp_sampler)(probs.repeat(count, 1), {i: Stream(i) for i in range(count)})
    found = torch.bincount(chosen, minlength=5)
    assert ((found - count * probs).abs() <= 5 * (count * probs * (1 - probs)).sqrt()).all(), found


def a_request_draws_the_same_in_every_batch() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    from rollout.vllm.sampling import _together

    sample = _together(topk_topp_sampler)
    probs = torch.rand(6, WIDTH, generator=torch.Generator().manual_seed(0)).softmax(-1)
    alone, first, last = Stream(11), Stream(11), Stream(11)
    written = [int(sample(probs[:1].clone(), {0: alone})) for _ in range(5)]
    assert len(set(written)) > 1
    for i, token in enumerate(written):
        others = {row: Stream(row) for row in (1, 3)}  # the rest has no seeds
        assert sample(probs.clone(), {0: first, **others})[0] == token
        moved = probs.clone()
        moved[5] = probs[0]
        assert sample(moved, {5: last, **others})[5] == token, i


@pytest.mark.parametrize(
    "check", [rows_are_those_of_seed_and_draw, tokens_follow_the_probabilities, a_request_draws_the_same_in_every_batch]
)
def test_interpreted(check):
    """In a process of its own: Triton reads the variable when it is imported."""
    name = check.__name__
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.rollout.test_noise import {name}; {name}()"],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_makes_the_expected_noise_and_advances_generators():
    from rollout.vllm.sampling import as_expected, fill_seeded

    device = torch.device("cuda")
    assert as_expected(device)
    generators = {row: torch.Generator(device).manual_seed(5) for row in (0, 2)}
    one, two = (torch.zeros(3, WIDTH, device=device) for _ in range(2))
    fill_seeded(one, generators)
    fill_seeded(two, generators)
    assert torch.equal(one[0], one[2]) and not one[1].any() and not torch.equal(one[0], two[0])
