"""The checks of test_parallel_pipeline.py on two GPUs over NCCL: float32 where stages and one model must agree."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from parallel_checks import free_address
from pipeline_checks import rank_main

from trainer.parallel.pipeline import SCHEDULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SUMS = 2e-4  # float32 sums of numbers up to 1 in another order, through a GPU's exponentials


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    processes = mp.spawn(rank_main, (free_address(), str(folder), "cuda"), nprocs=2, join=False)
    while not processes.join(timeout=300):  # raises what a rank raised
        pass
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_stages_on_two_gpus_compute_what_the_whole_model_does(found, schedule):
    assert found[schedule].keys() == {"gradients", "load", "logprobs", "losses"}
    assert max(found[schedule].values()) < SUMS, found[schedule]
