"""Balance losses and routing replay on a GPU against the CPU, float32: the kernels there know affinities and replay."""

import numpy as np
import pytest
import torch

from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, load_policy

pytestmark = pytest.mark.gpu

V3 = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 16, "num_experts_per_tok": 4, "kv_lora_rank": 32, "n_group": 4,
    "topk_group": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip


def samples(replayed):
    """With half of the tokens' experts given, where `replayed`."""
    rng = np.random.default_rng(0)
    made = []
    for n in rng.integers(3, 30, 12):
        routed = None
        if replayed:
            routed = np.stack([rng.permutation(16)[:4] for _ in range(2 * (n + 2))]).reshape(n + 2, 2, 4)
            routed = routed.astype(np.int16)
            routed[::2] = -1
        made.append(Sample(rng.integers(0, 96, 2).tolist(), rng.integers(0, 96, n).tolist(), routed_experts=routed))
    return made


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_losses_and_gradients_are_those_of_the_cpu(kind, replayed):
    found = []
    for device in ("cpu", "cuda"):
        policy = load_policy(PolicyOptions(init=V3, dtype="float32"), device, seed=3)
        batches = pack(samples(replayed), 128)
        hits = policy.affinity_hits(batches, mtp=True) if kind == "batch" else None
        totals: dict[str, float] = {}
        for batch in batches:
            loss, metrics = policy.next_token_loss(batch, 0.3, kind, 0.5, hits)
            loss.backward()
            for name, value in {**metrics, "whole": loss.detach()}.items():
                totals[name] = totals.get(name, 0.0) + value.item()
        gradients = {name: p.grad.cpu() for name, p in policy.module.named_parameters() if p.grad is not None}
        found.append((totals, gradients, policy.take_router_load().cpu()))
    (cpu, cpu_gradients, cpu_load), (gpu, gpu_gradients, gpu_load) = found
    assert cpu.keys() == gpu.keys() >= {"balance_loss", "mtp_loss/2"}
    for name, value in cpu.items():
        assert gpu[name] == pytest.approx(value, rel=1e-3), name
    assert torch.equal(cpu_load, gpu_load)
    for name, gradient in cpu_gradients.items():
        assert (gpu_gradients[name] - gradient).abs().max() < 2e-2 * gradient.abs().max(), name
