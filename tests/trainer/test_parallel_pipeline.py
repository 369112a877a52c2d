"""Layers in stages on two ranks compute what one model does, under every schedule. Two processes over gloo, float32."""

import json
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from parallel_checks import free_address
from pipeline_checks import rank_main

from trainer.parallel.pipeline import SCHEDULES, split_layers, stages_of

SUMS = 1e-5  # float32 sums of numbers up to 1 in another order


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    processes = mp.spawn(rank_main, (free_address(), str(folder)), nprocs=2, join=False)
    while not processes.join(timeout=300):  # raises what a rank raised
        pass
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_stages_compute_what_the_whole_model_does(found, schedule):
    assert found[schedule].keys() == {"gradients", "load", "logprobs", "losses"}
    assert max(found[schedule].values()) < SUMS


def test_embedding_and_head_count_as_a_layer_each():
    assert split_layers(61, 4) == [range(0, 15), range(15, 31), range(31, 46), range(46, 61)]
    assert split_layers(4, 4) == [range(i, i + 1) for i in range(4)]
    with pytest.raises(ValueError, match="3 layers do not make 4 stages"):
        split_layers(3, 4)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_stage_is_on_one_rank(schedule):
    stages = [stage for rank in range(4) for stage in stages_of(schedule, rank, 4)]
    assert sorted(stages) == list(range(len(stages)))
