"""Two ranks compute what one does: weights sharded, micro-batches dealt out, experts apart.

Two processes (`both`: four) over gloo on loopback, float32 unless said. All checks of one kind run in one set of
processes (parallel_checks.py) and report how far the ranks came apart from one; the bounds stand here.
"""

import json
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from parallel_checks import OPTIONS, free_address, rank_main

SUMS = 1e-5  # float32 sums of numbers up to 1 in another order


@pytest.fixture(scope="module", params=["dp", "ep", "sent", pytest.param("both", marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    arguments = (request.param, free_address(), str(folder))
    processes = mp.spawn(rank_main, arguments, nprocs=OPTIONS[request.param]["dp"], join=False)
    while not processes.join(timeout=300):  # raises what a rank raised
        pass
    return json.loads((folder / f"{request.param}.json").read_text())


def test_policy_gradient(found):
    assert max(found["policy_gradient"].values()) < SUMS


def test_policy_gradient_in_bfloat16(found):
    """Sums of numbers with 8 bits in another order, twelve roundings deep."""
    distances = found["in_bfloat16"]
    assert max(distances.values()) < 0.05, sorted(distances.items(), key=lambda pair: -pair[1])[:5]


def test_every_way_of_summing_gives_the_same_gradient(found):
    assert len(found["every_way_of_summing"]) == 3 and max(found["every_way_of_summing"].values()) < SUMS


def test_pretraining_with_multi_token_prediction_and_balance(found):
    assert found["pretraining"].pop("moved") == 1.0
    assert max(found["pretraining"].values()) < SUMS


def test_experts_without_tokens_and_uneven_ones(found):
    assert max(found["empty_and_uneven_experts"].values()) < SUMS


def test_logprobs_and_scores_are_those_of_one_rank_on_every_rank(found):
    assert max(found["logprobs"].values()) < SUMS


def test_rank_0_alone_is_given_the_whole_weights_bit_for_bit(found):
    assert found["whole_weights"] == {"apart": 0.0, "others": 0.0}


def test_every_tensor_is_given_out_by_one_rank_and_experts_by_their_own_bit_for_bit(found):
    assert found["owned_weights"] == {"apart": 0.0}


def test_a_checkpoint_of_one_or_two_ranks_resumes_on_one_or_two(found):
    """One more step of AdamW (rate 0.01) after resuming; on the same number of ranks bit for bit."""
    for name, value in found["resume"].items():
        dtype, saved, _, loaded, _ = name.split()
        bound = 0.0 if saved == loaded else 2e-3 if dtype == "float32" else 0.05
        assert value <= bound, (name, value)


def test_weights_of_a_folder_go_straight_into_the_shards(found):
    assert max(found["from_a_folder"].values()) == 0.0
