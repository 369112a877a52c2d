"""Folders that the trainer writes, in the real vLLM: log-probabilities are the trainer's. On a GPU also block-FP8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.probe import logprob_diff, probe_sequences
from tests.rollout.test_vllm_engine import VOCAB, save_tokenizer
from tests.rollout.vllm_process import CONTEXT, ON_GPU, Engines
from trainer.checkpoint import hf
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

pytestmark = pytest.mark.timeout(170)

# Low-rank queries, YaRN beyond the original context, two groups of experts, an MTP layer that an engine leaves aside.
# All sides but kv_a_proj's 576 rows are multiples of 128, which vLLM's FP8 wants.
CONFIG = V3Config(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    routed_scaling_factor=1.5, q_lora_rank=128, qk_nope_head_dim=64, v_head_dim=64, num_nextn_predict_layers=1,
    max_position_embeddings=512, initializer_range=0.08, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    rope_scaling={
        "type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
)  # fmt: skip
PROBES = probe_sequences(VOCAB, without=(0, 1, 2))
SEQUENCES = [(PROBES[i] * 20)[:length] for i, length in enumerate((9, 60, 180))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model in BF16 and in FP8; router biases so low that a mask of 0 in place of -inf would choose otherwise."""
    model = V3Model(CONFIG).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for router in model.routers():
        router.bias.uniform_(-2.0, -1.5, generator=generator)
    model.to(torch.bfloat16)
    folders = {}
    for format in ("bf16", "fp8"):
        folders[format] = tmp_path_factory.mktemp(format)
        hf.save_folder(model, folders[format], format=format, shard_bytes=200_000)
        save_tokenizer(folders[format])
    return folders


@pytest.fixture(scope="module")
def engines(folders, vllm_process) -> Iterator[Engines]:
    engines = Engines(folders, vllm_process)
    yield engines
    engines.close()


@torch.no_grad()
def trainers(folder: Path) -> list[np.ndarray]:
    """The trainer's log-probabilities in float32; each token's own, the first 0."""
    model = hf.load_folder(folder, torch.float32)
    scores = []
    for s in SEQUENCES:
        tokens = torch.tensor(s)
        hidden = model(tokens, torch.arange(len(s)), torch.tensor([0, len(s)])).hidden
        logprobs = model.logits(hidden).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        scores.append(np.concatenate([[0.0], logprobs.numpy()]))
    return scores


def test_the_sequences_reach_beyond_the_original_context():
    assert max(map(len, SEQUENCES)) > 2 * CONFIG.rope_scaling["original_max_position_embeddings"]
    assert max(map(len, SEQUENCES)) <= CONTEXT


def test_a_bfloat16_folder_gives_the_trainers_log_probabilities(engines, folders):
    """float32 arithmetic on the CPU: 1e-5 at the worst token. BF16 on a GPU: 0.05 in the mean."""
    engine = engines.get("bf16", "bfloat16" if ON_GPU else "float32")
    found = logprob_diff(engine.score(SEQUENCES), trainers(folders["bf16"]))
    print(found)
    assert found["mean_abs"] < 0.05 if ON_GPU else found["max_abs"] < 1e-5


@pytest.mark.gpu
def test_an_fp8_folder_gives_the_trainers_log_probabilities(engines, folders):
    """vLLM quantizes activations too, which the trainer's dequantized weights do not: 0.15 in the mean, and much nearer
    to this model than another would be."""
    engine = engines.get("fp8", "bfloat16")
    found = logprob_diff(engine.score(SEQUENCES), trainers(folders["fp8"]))
    print(found)
    assert found["mean_abs"] < 0.15
