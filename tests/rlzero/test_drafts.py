"""Speculative decoding and routing replay as a run sees them: what its metrics say, and what is published."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.score import Score
from rlzero import launch
from rlzero.cluster.actors import TrainerActor
from rlzero.config.rl import Config, Reward
from rlzero.report.log import read_lines
from rlzero.rl.groups import Graded, Group
from rlzero.rl.metrics import RolloutStats
from rollout.engine import Prompt, Rollout
from rollout.transport.transports import Transport
from trainer.optimizer import OptimizerOptions
from trainer.policy import PolicyOptions

V3 = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8, "n_group": 1,
    "topk_group": 1, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 32,
}  # fmt: skip


def metrics(*drafts: tuple[int, int, int]) -> dict[str, float]:
    rollouts = [Rollout("p", i, (1,), [2], [-1.0], [(0, 1)], "stop", "", drafts=d) for i, d in enumerate(drafts)]
    group = Group(Prompt("p", "q", (1,)), rollouts, [[Score(1.0, "correct")] for _ in rollouts])
    ones = np.ones((1, len(rollouts)))
    return RolloutStats([Graded([group], ones, ones > 0, ones[:, 0] > 0)]).metrics((Reward(fn="a:b"),))


def test_acceptance_is_over_all_drafted_tokens_of_the_step():
    found = metrics((4, 8, 6), (1, 2, 0))
    assert found["spec_acceptance"] == 0.6 and found["spec_length"] == pytest.approx(1 + 6 / 5)


def test_without_speculation_nothing_is_said_of_it():
    assert not [name for name in metrics((0, 0, 0)) if name.startswith("spec")]


@pytest.mark.parametrize("mtp", [False, True])
def test_prediction_layers_are_sent_to_engines_that_draft_with_them(mtp):
    made = TrainerActor(0)
    made.open(PolicyOptions(init=V3, dtype="float32"), OptimizerOptions(), device="cpu")
    names = {spec.name for spec in made.prepare_weights(Transport("ipc", (1,)), 1, mtp).specs}
    assert ("model.layers.2.eh_proj.weight" in names) is mtp and "model.layers.1.mlp.gate.weight" in names


def test_a_run_with_replay_says_how_well_the_routers_agree(local_ray, write_config, tmp_path):
    """float32 on both sides: the trainer's router chooses what the engine's chose, for all but a near tie."""
    changes = {"steps": 2, "rollout.engine_args": {"return_routed_experts": True}, "evaluation.every": 0}
    config = Config.load(write_config(tmp_path, **changes))
    launch.train(config, resume=False)
    lines = read_lines(config.run_dir / "metrics.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert 0.99 < line["router_agreement"] <= line["router_overlap"] <= 1 and line["gap"] < 1e-4
