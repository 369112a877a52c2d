"""Block-FP8 in vLLM: where the weights go (its own model and loaders, on a CPU, vllm_fp8_checks.py), and whether it
computes with them (a Hopper GPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TENSORS = 69  # of two layers with four experts, 28 of them scales


def run(*command: str, timeout_s: float) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    return json.loads(run("-m", "tests.rollout.vllm_fp8_checks", folder, timeout_s=500).splitlines()[-1])


def test_after_a_first_reload_fp8_weights_and_scales_go_straight_to_their_places(found):
    assert found["updates"] == [["reload", TENSORS, TENSORS], *[["direct", TENSORS, TENSORS]] * 2]
    assert found["reasons"] == [None] * 3


def test_absorbed_projections_are_those_of_the_dequantized_weights_after_every_update(found):
    assert found["derived"] == 4 and len(found["apart"]) == 6
    assert max(found["apart"]) < 2**-8  # their rounding to BF16


def test_absorbed_projections_stay_at_their_addresses(found):
    assert found["moved"] == 0


def test_the_experts_kernels_read_the_scales_that_updates_write(found):
    """vLLM's reload leaves them with others, which reading the layer's own back would not notice."""
    assert found["kernels' scales"] == [True, True]


def test_a_scale_that_is_wrong_in_the_engine_is_named(found):
    assert found["wrong"] == ["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]


@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_an_fp8_engine_computes_with_every_set_of_weights_that_it_is_sent(tmp_path):
    """The benchmark's figures: every tensor read back, log-probabilities of the decoder on dequantized weights, for all
    weights together and for each kind alone."""
    figures = tmp_path / "figures.json"
    run("benchmarks/weight_sync.py", "--fp8", "--cycles", "3", "--json", str(figures), timeout_s=380)
    found = json.loads(figures.read_text())
    assert found["the engine answers nothing before its first weights"] is True
    assert [found[f"sync {i}, mode"] for i in (1, 2, 3)] == ["reload", "direct", "direct"]
    verified, _, total, _ = found["sync 3, read back and equal"].split()
    assert verified == total
    for i in (1, 2, 3):
        assert found[f"sync {i}, gap to the new weights"] < 0.5 * found[f"sync {i}, gap to the old weights"]
    families = [value for name, value in found.items() if name.startswith("only ")]
    assert len(families) == 8
    for new, _, old in (value.split() for value in families):
        assert float(new) < float(old)
