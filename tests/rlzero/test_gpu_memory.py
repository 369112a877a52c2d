"""The trainer's memory on a GPU against peaks that were measured (benchmarks/RESULTS.md, one and two H100s), and the
rules of what stands together."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.train_step_gpu import TOKENS, V3_2B
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.plan import of_run
from rlzero.plan.memory import TrainerWork, cache_for, kept_of_layer, trainer_memory
from rlzero.plan.of_run import Device, describe_gpu, engine_options, gpu_of, make_plan, shortage, sleep_level
from rlzero.plan.size import LayerSize, read_size, size_of_architecture
from rlzero.rl.run import Run
from trainer.model.v3_config import V3Config

GB = 1e9
H100 = Device("H100 80GB", int(79.1 * 2**30), False)


@pytest.fixture(scope="module")
def layers() -> list[LayerSize]:
    return list(size_of_architecture(V3_2B)[0].by_layer)


# `max_memory_allocated` in GB, of benchmarks/train_step.py and benchmarks/scaling.py, when masters had 4 bytes.
MEASURED = [
    ("16 x 1024", 42.1, {"equal": True}),
    ("selective checkpointing", 36.05, {"equal": True, "recompute": "selective"}),
    ("full checkpointing", 26.7, {"equal": True, "recompute": "full"}),
    ("one micro-batch of mixed lengths", 42.9, {}),
    ("two micro-batches of mixed lengths", 45.3, {"micro_batches": 2}),
    ("GRPO update on 256 k tokens", 50.0, {"equal": True, "micro_batches": 16}),
    ("DP 2", 34.1, {"equal": True, "dp": 2}),
    ("EP 2", 32.5, {"equal": True, "dp": 2, "ep": 2}),
]


@pytest.mark.parametrize(("measured_gb", "work"), [row[1:] for row in MEASURED], ids=[row[0] for row in MEASURED])
def test_the_count_is_within_six_percent_of_what_was_measured(layers, measured_gb, work):
    given = {"tokens": TOKENS, "micro_batches": 1, "moments": 2, "master": 4, **work}
    held = trainer_memory(V3_2B, layers, TrainerWork(**given))
    assert held.allocated / GB == pytest.approx(measured_gb, rel=0.06)


def test_more_micro_batches_add_the_sums_of_gradients_and_then_nothing(layers):
    """FP32 sums stand beside the activations from the third on: 4 bytes a parameter."""
    peaks = [
        trainer_memory(V3_2B, layers, TrainerWork(TOKENS, n, moments=2)).allocated for n in (1, 2, 3, 4, 50)
    ]  # fmt: skip
    assert peaks[0] < peaks[1] < peaks[2] == peaks[3] == peaks[4]
    parameters = sum(layer.all for layer in layers) + 2 * V3_2B.vocab_size * V3_2B.hidden_size
    assert peaks[2] - peaks[0] == pytest.approx(4 * parameters, rel=0.02)


@pytest.mark.parametrize("dense", [True, False])
def test_recomputing_keeps_less(dense):
    none, selective, full = (kept_of_layer(V3_2B, dense, kind) for kind in ("none", "selective", "full"))
    rows = 0 if dense else 2 * V3_2B.num_experts_per_tok * (V3_2B.hidden_size + V3_2B.moe_intermediate_size)
    assert none - selective == rows and full == 2 * V3_2B.hidden_size


def test_at_rest_stay_the_states_alone(layers):
    held = trainer_memory(V3_2B, layers, TrainerWork(TOKENS, 4, moments=2), buffers=1 << 29)
    states = (2 + 2 + 4) * (sum(layer.all for layer in layers) + 2 * V3_2B.vocab_size * V3_2B.hidden_size)
    assert held.at_rest == pytest.approx(states + (1 << 29) + (600 << 20), rel=1e-4)


# ---- what stands together ----

MANY = {"batch.prompts": 64, "batch.group_size": 8, "batch.tokens_per_micro_batch": 16_384}


@pytest.fixture
def plan_of(write_config, tmp_path):
    def plan(device_bytes: int | None = None, **changes):
        changes = {"device": "cuda", "rollout.engine": "vllm", "cluster.placement": "colocated", **changes}
        config = Config.load(write_config(tmp_path, **changes))
        device = H100 if device_bytes is None else Device("small GPU", device_bytes, False)
        return config, make_plan(config, device)

    return plan


def test_both_stay_awake_where_both_fit(plan_of):
    _, plan = plan_of()
    assert plan.sleep_level == 0 and plan.lacking == 0 and plan.cache_bytes == plan.full_cache_bytes
    assert plan.training == plan.writing == plan.trainer.peak + plan.engine.peak


def test_engines_sleep_where_only_one_of_both_fits(plan_of):
    _, plan = plan_of(**MANY)
    together = plan.training
    _, plan = plan_of(round(together / 0.94) - (8 << 20), **MANY)
    assert plan.sleep_level == 2 and plan.lacking == 0
    assert plan.training == plan.trainer.peak + plan.engine.at_rest <= plan.device.room
    assert plan.writing == plan.trainer.at_rest + plan.engine.peak <= plan.device.room
    _, plan = plan_of(round(together / 0.94) + (8 << 20), **MANY)
    assert plan.sleep_level == 0


def test_engines_that_always_write_get_the_cache_that_is_left(plan_of):
    _, plan = plan_of()
    less = round((plan.training - plan.cache_bytes // 2) / 0.94)
    _, plan = plan_of(less, staleness=1, **{"loss.correction": "tis"})
    assert plan.sleep_level == 0 and plan.lacking == 0
    assert 0 < plan.cache_bytes < plan.full_cache_bytes and plan.training <= plan.device.room


def test_what_does_not_even_fit_in_turn_says_by_how_much_and_what_helps(plan_of, monkeypatch):
    config, plan = plan_of(1 << 30)
    assert plan.lacking > 0
    assert plan.lacking == max(plan.training, plan.writing) - (1 << 30)
    monkeypatch.setattr(of_run, "find_device", lambda *_: Device("small GPU", 1 << 30, False))
    text = shortage(config, make_plan(config))
    for part in ("small GPU", "too much", "activation_checkpointing", "moments: bfloat16"):
        assert part in text
    with pytest.raises(UsageError, match="too much"):
        Run(config, resume=False)


def test_on_gpus_of_their_own_nobody_sleeps(plan_of):
    _, plan = plan_of(**{"cluster.placement": "disaggregated"})
    assert not plan.shared and plan.sleep_level == 0
    assert plan.training == plan.trainer.peak and plan.writing == plan.engine.peak


def test_what_the_user_asks_of_the_engine_goes_before_the_plan(plan_of):
    _, plan = plan_of(**{"rollout.engine_args": {"kv_cache_memory_bytes": 1 << 30, "sleep_level": 1}})
    assert plan.cache_bytes == 1 << 30 and plan.sleep_level == 1
    config, plan = plan_of(**{"rollout.engine_args": {"gpu_memory_utilization": 0.5}})
    assert plan.engine.peak == pytest.approx(0.5 * H100.nbytes, rel=1e-6)
    assert "gpu_memory_utilization" not in engine_options(config, "vllm")


def test_the_engine_is_told_its_cache_and_no_more_than_is_free_of_the_device(plan_of):
    config, plan = plan_of()
    options = engine_options(config, "vllm")
    assert options["kv_cache_memory_bytes"] == plan.cache_bytes and options["sleep_level"] == sleep_level(config) == 0
    assert options["max_context"] == 64 + 24
    assert 0 < options["gpu_memory_utilization"] * H100.nbytes <= max(plan.engine.peak, 0.01 * H100.nbytes)
    assert engine_options(config, "torch") == {}


def test_the_cache_holds_every_running_request_in_whole_blocks(plan_of):
    config, plan = plan_of()
    values = read_size(config.policy.path).cache_values
    assert plan.cache_bytes == cache_for(9, 88, 4 * values) == (9 * 2 + 1) * 64 * 4 * values


def test_the_plan_of_a_cpu_says_nothing_of_gpus(write_config, tmp_path):
    if torch.cuda.is_available():
        pytest.fail("this test is for a machine without a GPU: run `make test-gpu` there")
    config = Config.load(write_config(tmp_path))
    assert gpu_of(config) is None and sleep_level(config) == 0 and engine_options(config, "vllm") == {}


def test_the_table_names_the_device_and_that_it_is_assumed(plan_of):
    text = "\n".join(describe_gpu(plan_of()[1]))
    for part in ("H100 80GB", "assumed", "together", "trainer", "engine", "cache", "CUDA graphs"):
        assert part in text


def test_an_mtp_layers_copies_of_the_tables_are_not_counted(tiny_policy):
    config = V3Config.from_hf(json.loads((tiny_policy / "config.json").read_text()))
    found, counted = read_size(tiny_policy), size_of_architecture(config)[0]
    assert found.mtp == counted.mtp and found.by_layer == counted.by_layer and found.parameters == counted.parameters


def test_what_engines_do_while_the_trainer_works(plan_of, monkeypatch):
    """Asked for, it is done; else they sleep only on a GPU that does not hold both, and where they do not write."""

    def level(nbytes: int, **changes) -> int:
        monkeypatch.setattr(of_run, "find_device", lambda *_: Device("GPU", nbytes, False))
        return sleep_level(plan_of(**{**MANY, **changes})[0])

    _, plan = plan_of(**MANY)
    large, small = H100.nbytes, round(plan.training / 0.94) - (8 << 20)
    asynchronous = {"staleness": 1, "loss.correction": "tis"}
    assert level(large) == 0 and level(small) == 2
    assert level(large, **{"rollout.engine_args": {"sleep_level": 2}}) == 2
    assert level(small, **{"rollout.engine_args": {"sleep_level": 0}}) == 0
    assert level(small, **asynchronous) == 0
    assert level(small, **{"cluster.placement": "disaggregated"}) == 0
