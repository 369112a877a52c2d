"""The trainer on a GPU against the same trainer on the CPU."""

import pytest
import torch

from trainer.losses import LossOptions
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions
from trainer.trainer import Trainer

pytestmark = pytest.mark.gpu

V3 = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
INITS = {"v3": V3, "llama": LLAMA}


def trainer(init, device, dtype="float32", gamma=0.0):
    policy = PolicyOptions(init=init, dtype=dtype)
    loss = LossOptions(kl_coef=0.01, aggregation="token")
    return Trainer(policy, OptimizerOptions(lr=1e-3, router_bias_gamma=gamma), loss, seed=3, device=device)


def samples(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 24, (12,), generator=g).tolist()
    drawn = [torch.randint(0, 96, (n + 4,), generator=g).tolist() for n in lengths]
    return [
        Sample(ids[:4], ids[4:], float(i % 3 - 1), [-4.5] * (len(ids) - 4), [(0, len(ids) - 4)])
        for i, ids in enumerate(drawn)
    ]


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_steps_on_a_gpu_are_those_of_the_cpu(init):
    found = []
    for device in ("cpu", "cuda"):
        t = trainer(init, device)
        metrics = t.step([pack(samples(i), 96) for i in range(2)])
        documents = [Sample((), s.tokens, loss_on_prompt=True) for s in samples(2)]
        mtp = 0.1 if init is V3 else 0.0
        metrics |= {f"sft_{k}": v for k, v in t.next_token_step(pack(documents, 96), mtp_weight=mtp).items()}
        t.refresh_reference()
        found.append((metrics, t.score([[1, 2, 3, 4], [5, 6]], 0.7), dict(t.weights())))
    (cpu, cpu_scores, cpu_weights), (gpu, gpu_scores, gpu_weights) = found
    assert cpu.keys() == gpu.keys()
    for name, value in cpu.items():
        assert gpu[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    for a, b in zip(cpu_scores, gpu_scores, strict=True):
        assert abs(a - b).max() < 2e-3
    for name, tensor in cpu_weights.items():
        assert gpu_weights[name].device.type == "cpu"
        assert (tensor - gpu_weights[name]).abs().max() < 6e-3, name  # three AdamW steps of 1e-3


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_a_checkpoint_moves_between_devices(init, tmp_path):
    t = trainer(init, "cuda", "bfloat16")
    t.step([pack(samples(0), 96)])
    t.refresh_reference()
    t.save(tmp_path / "step-1", {"a": 1})
    for device in ("cpu", "cuda"):
        other = trainer(init, device, "bfloat16")
        assert other.load(tmp_path / "step-1") == {"a": 1}
        for (name, found), (_, saved) in zip(other.weights(mtp=True), t.weights(mtp=True), strict=True):
            assert torch.equal(found, saved), name
        assert other.step([pack(samples(1), 96)])["updates"] == 1.0


def test_bfloat16_with_masters_learns_by_heart_on_a_gpu():
    t = trainer(V3, "cuda", "bfloat16", gamma=1e-3)
    t.optimizer.options = t.optimizer.options.model_copy(update={"lr": 1e-2})
    batches = pack([Sample((), s.tokens, loss_on_prompt=True) for s in samples(5)], 96)
    first = t.next_token_step(batches, mtp_weight=0.1)["loss"]
    for _ in range(80):
        last = t.next_token_step(batches, mtp_weight=0.1)["loss"]
    assert first > 4 and last < 1.0
