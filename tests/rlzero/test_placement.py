"""Which GPU each process of a run gets, what decides it, and what is refused."""

from __future__ import annotations

import pytest

from rlzero.cluster.placement import choose, plan
from rlzero.config.read import ConfigError
from rlzero.config.rl import Config


@pytest.fixture
def on_gpu(write_config, tmp_path):
    """The config of a run on GPUs; nothing of it is started."""

    def load(**changes) -> Config:
        changes = {f"rollout.{k}" if k in ("workers", "transport", "engine_args") else k: v for k, v in changes.items()}
        dp = changes.pop("dp", 1)
        stale = {"loss.correction": "tis"} if changes.get("staleness") else {}
        return Config.load(write_config(tmp_path, device="cuda", **{"parallel.dp": dp}, **stale, **changes))

    return load


@pytest.mark.parametrize(
    ("changes", "kind", "transport", "reason"),
    [
        ({}, "colocated", "ipc", "staleness 0"),
        ({"dp": 4, "workers": 4}, "colocated", "ipc", "staleness 0"),
        ({"dp": 4, "workers": 2}, "colocated", "ipc", "staleness 0"),
        ({"dp": 2, "workers": 3}, "disaggregated", "nccl", "more rollout workers (3) than trainer ranks (2)"),
        ({"engine_args": {"tensor_parallel_size": 2}}, "disaggregated", "nccl", "an engine takes 2 GPUs"),
        ({"staleness": 1}, "disaggregated", "nccl", "each on GPUs of its own"),
        ({"staleness": 1, "dp": 5, "workers": 4}, "colocated", "ipc", "would have 9 GPUs"),
        ({"cluster.placement": "disaggregated"}, "disaggregated", "nccl", "asked for"),
        ({"cluster.placement": "colocated", "staleness": 1}, "colocated", "ipc", "asked for"),
    ],
)
def test_what_placement_auto_comes_to_on_eight_gpus(on_gpu, changes, kind, transport, reason):
    found = choose(on_gpu(**changes), gpus=8)
    assert (found.kind, found.transport) == (kind, transport) and reason in found.reason


def test_on_a_cpu_every_process_has_a_place_of_its_own(write_config, tmp_path):
    config = Config.load(write_config(tmp_path, **{"parallel.dp": 2, "rollout.workers": 2}))
    placed = plan(config)
    assert (placed.choice.kind, placed.choice.transport) == ("disaggregated", "nccl")
    assert placed.bundles == [{"CPU": 1.0}] * 4 and placed.rank_of_worker == [0, 0]


def test_colocated_a_worker_has_the_gpu_of_its_rank(on_gpu):
    placed = plan(on_gpu(dp=3, workers=2), gpus=8)
    assert placed.bundles == [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert [p.resources["GPU"] for p in placed.ranks] == [0.5, 0.5, 1.0]
    assert [p.resources["GPU"] for p in placed.workers] == [0.5, 0.5]
    assert placed.rank_of_worker == [0, 1] and placed.of_bundle(1) == "trainer rank 1 and rollout worker 1"


def test_disaggregated_a_tensor_parallel_engine_has_its_gpus_on_one_node(on_gpu):
    placed = plan(on_gpu(dp=2, workers=2, engine_args={"tensor_parallel_size": 4}), gpus=16)
    assert [bundle["GPU"] for bundle in placed.bundles] == [1.0, 1.0, 4.0, 4.0]
    assert placed.workers[1].resources["GPU"] == 4.0 and not placed.shares_gpus
    assert placed.rank_of_worker == [0, 0]  # rank 0 has all weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster.placement": "colocated", "workers": 3, "dp": 2}, "3 rollout workers cannot share the GPUs of 2"),
        (
            {"cluster.placement": "colocated", "engine_args": {"tensor_parallel_size": 2}},
            "an engine of tensor_parallel_size 2 would share 2 GPUs",
        ),
        ({"transport": "nccl"}, "cannot broadcast between two processes on one GPU (placement colocated: staleness 0"),
        ({"transport": "ipc", "staleness": 1}, "here each has its own (placement disaggregated: staleness 1"),
        ({"engine_args": {"sleep_level": 1}, "cluster.placement": "disaggregated"}, "have GPUs of their own"),
        (
            {"engine_args": {"sleep_level": 1}, "staleness": 1, "cluster.placement": "colocated"},
            "engines write while the trainer trains and cannot sleep",
        ),
        ({"dp": 2, "optimizer.algorithm": "muon"}, "muon needs whole matrices"),
        ({"dp": 9, "parallel.ep": 9}, "9 ranks cannot share out the 8 routed experts"),
        ({"dp": 3, "parallel.ep": 2}, "ep 2 does not divide dp 3"),
        ({"parallel.pp": 2}, "a run trains whole models on every dp rank"),
        ({"parallel.schedule": "zbv"}, "is one of stages"),
        ({"parallel.deadline_s": 5.0}, "follows from rollout.deadline_s"),
    ],
)
def test_placements_that_cannot_be_are_refused(on_gpu, changes, message):
    with pytest.raises(ConfigError) as caught:
        on_gpu(**changes)
    (problem,) = caught.value.problems
    assert message in problem


def test_several_ranks_are_for_v3_policies(on_gpu, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="2 trainer ranks train DeepSeek-V3 models only, and .* is of type llama"):
        on_gpu(dp=2, **{"policy.path": str(tmp_path / "llama")})


def test_ranks_wait_for_each_other_as_long_as_the_run_waits_for_them(on_gpu):
    assert on_gpu(**{"rollout.deadline_s": 77.0}).parallel.deadline_s == 77.0
