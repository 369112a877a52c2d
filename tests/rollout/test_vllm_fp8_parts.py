"""Block-FP8 in workers that hold parts: where the weights go, with vLLM's own model and loaders, on a CPU
(vllm_fp8_parts_checks.py; one worker, whose parts are whole tensors)."""

import json

import pytest

from tests.rollout.test_vllm_fp8 import TENSORS, run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    return json.loads(run("-m", "tests.rollout.vllm_fp8_parts_checks", folder, timeout_s=500).splitlines()[-1])


def test_after_a_first_reload_fp8_weights_and_scales_go_straight_to_their_places(found):
    assert found["ways"] == ["reload", "direct", "direct"] and found["reasons"] == [None] * 3
    assert found["verified"] == [[TENSORS, TENSORS]] * 3


def test_the_experts_kernels_read_the_scales_that_updates_write(found):
    assert found["kernels' scales"] == [True, True]


def test_a_scale_that_is_wrong_in_the_worker_is_named(found):
    assert found["wrong"] == ["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
