"""vLLM's serving features: which engine arguments are refused and why, and the pure parts of those that are served."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from rollout.engine import Rollout
from rollout.vllm.draft import Drafts, kept_for_draft
from rollout.vllm.records import all_positions, continued
from rollout.vllm.serving import check_serving, drafts_from_policy

V3 = {"num_nextn_predict_layers": 1}
PLAIN = {"num_nextn_predict_layers": 0}
BALANCED = {"enable_eplb": True, "enable_expert_parallel": True, "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size is 2, .* use rollout.workers"),
        ({"enable_dbo": True}, "enable_dbo .* does nothing without data_parallel_size"),
        ({"ubatch_size": 2}, "ubatch_size"),
        ({"all2all_backend": "deepep_low_latency"}, "all2all_backend deepep_low_latency .* does nothing"),
        ({"enable_elastic_ep": True}, "enable_elastic_ep"),
        ({"eplb_config": {"num_redundant_experts": 2}}, "eplb_config without enable_eplb"),
        ({**BALANCED, "tensor_parallel_size": 1}, "needs enable_expert_parallel and tensor_parallel_size above 1"),
        (BALANCED, "eplb_config.use_async to false"),
        ({"speculative_config": {"method": "deepseek_mtp"}}, "this model has none"),
        ({"speculative_config": {"method": "ngram", "rejection_sample_method": "synthetic"}}, "not drawn from"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=f"engine_args: .*{message}"):
        check_serving(arguments, PLAIN, {})


def test_every_mistake_is_in_the_one_error():
    with pytest.raises(ValueError, match="enable_dbo.*; all2all_backend.*; eplb_config"):
        check_serving({"enable_dbo": True, "all2all_backend": "nixl_ep", "eplb_config": {"window_size": 5}}, V3, {})


def test_data_parallelism_of_the_environment_is_refused_too():
    with pytest.raises(ValueError, match="data_parallel_size is 4"):
        check_serving({}, V3, {"VLLM_DP_SIZE": "4"})


def test_a_cpu_does_not_speculate():
    with pytest.raises(ValueError, match="leave it out on a CPU"):
        check_serving({"speculative_config": {"method": "ngram"}}, V3, {}, speculates_here=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 512},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "allgather_reducescatter"},
        {**BALANCED, "eplb_config": {"use_async": False, "num_redundant_experts": 2, "step_interval": 100}},
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}},
    ],
)
def test_what_can_be_served_passes(arguments):
    check_serving(arguments, V3, {})


def test_only_drafts_of_the_policys_own_layers_need_them_published():
    for method, expected in {"mtp": True, "deepseek_mtp": True, "ngram": False}.items():
        assert drafts_from_policy({"speculative_config": {"method": method}}) is expected
    assert not drafts_from_policy({}) and not drafts_from_policy({"speculative_config": None})


def test_weights_of_prediction_layers_are_kept_beside_passing_on():
    names = ["model.embed_tokens.weight", "model.layers.2.x.weight", "model.layers.3.eh_proj.weight", "lm_head.weight"]
    kept: list = []
    passed = list(kept_for_draft(((name, torch.zeros(1)) for name in names), 3, kept))
    assert [name for name, _ in passed] == names and [name for name, _ in kept] == names[2:3]


def test_drafts_are_counted_by_request_and_vllm_still_sees_them():
    class Scheduler:
        seen = 0

        def make_spec_decoding_stats(self, stats, num_draft_tokens, num_accepted_tokens, num_invalid, request_id):
            self.seen += num_draft_tokens
            return stats

    scheduler = Scheduler()
    drafts = Drafts(scheduler)
    for request, drafted, accepted in (("a", 2, 1), ("b", 2, 2), ("a", 1, 0)):
        found = scheduler.make_spec_decoding_stats(
            "so far", num_draft_tokens=drafted, num_accepted_tokens=accepted, num_invalid=None, request_id=request
        )
        assert found == "so far"
    assert scheduler.seen == 5
    assert drafts.take("a") == (2, 3, 1) and drafts.take("a") == (0, 0, 0) and drafts.take("b") == (1, 2, 2)


def test_a_continuation_adds_its_drafts_to_those_before():
    base = Rollout("p", 0, (1,), [2], [-1.0], [(0, 1)], "interrupted", "", drafts=(3, 6, 2))
    assert continued(base, [3], [-1.0], [(1, 1)], "stop", "", None, (1, 2, 2)).drafts == (4, 8, 4)


def test_routing_is_that_of_the_layers_with_experts_and_of_the_tokens_read():
    """vLLM numbers all layers, leaves dense ones blank, and knows nothing of the last token sampled."""
    routed = np.zeros((4, 3, 2), np.uint8)
    routed[:, 1], routed[:, 2] = (255, 0), (3, 7)
    routed[2, 2] = 0  # a row that no kernel filled
    found = all_positions(routed, 5, dense_layers=1)
    assert found.dtype == np.int16 and found.shape == (5, 2, 2)
    assert (found[:4, 0] == (255, 0)).all() and (found[[0, 1, 3], 1] == (3, 7)).all()
    assert (found[4] == -1).all() and (found[2, 1] == -1).all()


def test_routing_that_vllm_never_recorded_is_an_error():
    with pytest.raises(RuntimeError, match="choose the experts themselves"):
        all_positions(np.zeros((4, 3, 2), np.uint8), 5, dense_layers=1)


PLACEMENT = """
import torch
from types import SimpleNamespace
from vllm.distributed.eplb.eplb_state import EplbState, _commit_eplb_maps
from rollout.vllm.serving import reset_expert_placement

model = SimpleNamespace(num_routed_experts=4, num_redundant_experts=2)
placed = SimpleNamespace(
    model=model,
    physical_to_logical_map=torch.zeros(2, 6, dtype=torch.long),
    logical_to_physical_map=torch.full((2, 4, 9), -1),
    logical_replica_count=torch.zeros(2, 4, dtype=torch.long),
    expert_load_pass=torch.ones(2, 6),
    expert_load_window=torch.ones(3, 2, 6),
)
_commit_eplb_maps(placed, torch.tensor([[3, 1, 2, 0, 3, 3], [0, 1, 2, 3, 2, 1]]))  # as load balancing moved them
assert placed.logical_replica_count.tolist() == [[1, 1, 1, 3], [1, 2, 2, 1]]
state = SimpleNamespace(
    model_states={"one": placed},
    build_initial_global_physical_to_logical_map=EplbState.build_initial_global_physical_to_logical_map,
)
reset_expert_placement(SimpleNamespace(eplb_state=state))
assert placed.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
assert placed.logical_replica_count.tolist() == [[2, 2, 1, 1]] * 2
assert placed.logical_to_physical_map[:, 0].tolist() == [[0, 4] + [-1] * 7] * 2
assert not placed.expert_load_window.any() and not placed.expert_load_pass.any()
reset_expert_placement(SimpleNamespace())  # a worker without load balancing
"""


def test_after_a_reload_experts_are_where_they_were_at_the_start():
    """With vLLM's own maps, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PLACEMENT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
