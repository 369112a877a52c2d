"""The checks of test_parallel.py on two GPUs over NCCL: float32 where one rank and two must agree."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from parallel_checks import free_address, rank_main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SUMS = 2e-4  # float32 sums of numbers up to 1 in another order, through a GPU's exponentials


@pytest.fixture(scope="module", params=["dp", "ep", "sent"])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    processes = mp.spawn(rank_main, (request.param, free_address(), str(folder), "cuda"), nprocs=2, join=False)
    while not processes.join(timeout=300):  # raises what a rank raised
        pass
    return json.loads((folder / f"{request.param}.json").read_text())


@pytest.mark.parametrize(
    "check", ["policy_gradient", "every_way_of_summing", "empty_and_uneven_experts", "logprobs", "pretraining"]
)
def test_two_gpus_compute_what_one_does(found, check):
    values = {name: value for name, value in found[check].items() if name != "moved"}
    assert max(values.values()) < SUMS, values


def test_gradients_in_bfloat16(found):
    """Through the grouped products' own kernels, with buffers longer than their rows."""
    distances = found["in_bfloat16"]
    assert max(distances.values()) < 0.05, sorted(distances.items(), key=lambda pair: -pair[1])[:5]


def test_rank_0_is_given_the_whole_weights_bit_for_bit(found):
    assert found["whole_weights"] == {"apart": 0.0, "others": 0.0}


def test_checkpoints_resume_on_one_or_two_gpus(found):
    for name, value in found["resume"].items():
        dtype, saved, _, loaded, _ = name.split()
        bound = 1e-4 if saved == loaded else 2e-2 if dtype == "float32" else 0.1
        assert value <= bound, (name, value)
