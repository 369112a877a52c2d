"""`rlzero train` on GPUs with vLLM: the real command, a tiny V3 policy, a few steps. Each test starts everything anew;
most of a minute of it is vLLM's start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlzero.examples.countdown import text as base_text
from rlzero.report.log import read_lines
from trainer.model.v3_config import V3Config
from trainer.policy import PolicyOptions, load_policy

from .conftest import Train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

GAP = 0.03  # mean |delta logprob| between vLLM and the trainer, both in BF16
ENGINE = {"enforce_eager": True, "gpu_memory_utilization": 0.3, "max_context": 128}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A V3 model that vLLM's MLA kernels take: 512 latent and 64 rotary channels."""
    folder = tmp_path_factory.mktemp("gpu-policy")
    tokenizer = base_text.tokenizer()
    config = V3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
        first_k_dense_replace=1, num_attention_heads=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        n_group=4, topk_group=2, q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, max_position_embeddings=128, initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    load_policy(PolicyOptions(init=vars(config), dtype="bfloat16"), torch.device("cpu"), seed=0).save(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(policy, write_config, tmp_path, monkeypatch):
    """Runs the command to its end and returns what it said and its steps' metrics."""
    for name, value in {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0"}.items():
        monkeypatch.setenv(name, os.environ.get(name, value))

    def run(*arguments: str, **changes: Any) -> tuple[str, list[dict]]:
        quiet = {"data.evaluation": None, "evaluation.every": 0, "checkpoint.every": 0}
        config = write_config(
            tmp_path, device="cuda",
            **{
                "policy.path": str(policy), "policy.dtype": "bfloat16", "rollout.engine": "vllm", "threads": 0,
                "rollout.engine_args": ENGINE, "rollout.max_gap": GAP, "batch.prompts": 8, "batch.group_size": 4,
                "optimizer.lr": 1e-4, "steps": 4, **quiet, **changes,
            },
        )  # fmt: skip
        with Train(config, *arguments) as command:
            code = command.wait(330)
            print(command.text)
            assert code == 0, command.text
            lines = read_lines(command.run_dir / "metrics.jsonl")
            for line in lines:
                print({name: line[name] for name in ("step", "sync_gap", "gap", "time_train_s", "time_sync_s")})
            return command.text, lines

    return run


def assert_in_step(lines: list[dict], steps: int, staleness: int = 0) -> None:
    """Every step was made, learned something, and left engine and trainer with the same weights. Of completions that an
    older policy wrote the gap says how far the policy went since."""
    assert [line["step"] for line in lines] == list(range(steps))
    assert all(line["sync_gap"] < GAP and line["grad_norm"] > 0 for line in lines)
    assert staleness or all(line["gap"] < GAP for line in lines)
    assert all(line["policy_version"] == line["step"] + 1 for line in lines)


def test_trainer_and_engine_take_turns_on_one_gpu(train):
    said, lines = train(**{"rollout.engine_args": {**ENGINE, "sleep_level": 2}})
    assert "placement: colocated (staleness 0" in said and "), ipc" in said
    assert_in_step(lines, 4)


def test_trainer_and_engine_that_both_fit_never_sleep_and_a_run_resumes(train):
    awake = {"rollout.engine_args": {**ENGINE, "sleep_level": 0}, "checkpoint.every": 2}
    train(steps=2, **awake)
    _, lines = train("--resume", **awake)
    assert_in_step(lines, 4)


@two_gpus
def test_an_asynchronous_run_has_trainer_and_engine_on_gpus_of_their_own(train):
    said, lines = train(staleness=1, **{"loss.correction": "tis"})
    assert "placement: disaggregated (staleness 1" in said and "), nccl" in said
    assert_in_step(lines, 4, staleness=1)


@two_gpus
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_share_their_gpus_with_two_engines(train, ep):
    said, lines = train(
        **{
            "parallel.dp": 2, "parallel.ep": ep, "rollout.workers": 2,
            "rollout.engine_args": {**ENGINE, "sleep_level": 2},
        }
    )  # fmt: skip
    assert "placement: colocated (staleness 0" in said and "), ipc" in said
    assert_in_step(lines, 4)
