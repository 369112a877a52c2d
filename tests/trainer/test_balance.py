"""Balance losses against the report's formula in float64, whatever the packing, and the routers' figures in a step."""

import dataclasses

import numpy as np
import pytest
import torch

from trainer.losses import LossOptions
from trainer.model.balance import affinity_hits, batch_balance, router_metrics
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, load_policy
from trainer.trainer import Trainer

V3 = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "n_group": 4,
    "topk_group": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS, K = 8, 2


def trainer(init=V3, **options):
    loss = options.pop("loss", None)
    policy = PolicyOptions(init=init, dtype="float32")
    optimizer = OptimizerOptions(**{"lr": 1e-2, "weight_decay": 0.0, **options})
    return Trainer(policy, optimizer, loss, seed=5, threads=1, device="cpu")


def samples(count=7, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(0, 96, 3).tolist(), rng.integers(0, 96, int(n)).tolist())
        for n in rng.integers(3, 20, count)
    ]


def balance_by_hand(scores):
    """Eq. 17-20 without α, over the tokens given, in plain Python and float64."""
    tokens = scores.double()
    t, total = len(tokens), 0.0
    for i in range(EXPERTS):
        hits = sum(1 for row in tokens.detach() if i in sorted(range(EXPERTS), key=lambda e: -float(row[e]))[:K])
        affinity = sum(row[i] / row.sum() for row in tokens) / t
        total = total + EXPERTS / (K * t) * hits * affinity
    return total


def test_the_parts_of_a_batch_sum_to_the_reports_formula_in_value_and_gradient():
    scores = torch.rand(50, EXPERTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hits = affinity_hits(scores, K)
    parts = [batch_balance(part, K, hits) for part in scores.split([7, 1, 30, 12])]
    sum(parts).backward()
    exact = scores.detach().double().requires_grad_()
    expected = balance_by_hand(exact)
    expected.backward()
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-6)
    assert (scores.grad.double() - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max()
    assert hits.sum() == 50 * K


def affinities(policy, documents, mtp):
    """Of every router, one matrix per document: sigmoid of the router's inputs, recomputed in float64."""
    seen = []
    hooks = [
        router.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0].detach())))
        for router in policy.module.routers()
    ]
    found = []
    for sample in documents:
        (batch,) = pack([sample], 64)
        seen.clear()
        with torch.no_grad():
            policy.next_token_loss(batch, mtp_weight=0.1 if mtp else 0.0)
        found.append([(x.double() @ layer.weight.detach().double().T).sigmoid() for layer, x in seen])
    for hook in hooks:
        hook.remove()
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_the_loss_of_a_step_is_cross_entropy_plus_alpha_times_every_routers_balance(kind, mtp):
    policy = load_policy(PolicyOptions(init=V3, dtype="float32"), "cpu", seed=3)
    documents, weight = samples(), 0.1 if mtp else 0.0
    batches = pack(documents, 40)
    assert len(batches) > 2
    hits = policy.affinity_hits(batches, mtp=mtp)
    plain = sum(policy.next_token_loss(batch, weight)[0].item() for batch in batches)
    parts = [policy.next_token_loss(batch, weight, kind, 0.5, hits) for batch in batches]
    routers = affinities(policy, documents, mtp)
    assert len(routers) == (3 if mtp else 2)
    if kind == "sequence":
        expected = [sum(balance_by_hand(scores) for scores in of_router) / len(documents) for of_router in routers]
    else:
        expected = [balance_by_hand(torch.cat(of_router)) for of_router in routers]
    assert sum(loss.item() for loss, _ in parts) - plain == pytest.approx(0.5 * sum(expected).item(), rel=1e-4)
    mean = (sum(expected) / len(expected)).item()
    assert sum(metrics["balance_loss"].item() for _, metrics in parts) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_packing_into_other_micro_batches_changes_no_gradient(kind):
    """Without momentum the optimizer's first moment after a step is the step's gradient."""
    gradients = []
    for budget in (24, 1000):
        t = trainer(betas=(0.0, 0.95), max_grad_norm=1e9)
        t.next_token_step(pack(samples(), budget), mtp_weight=0.1, balance=kind, balance_weight=0.5)
        gradients.append({n: g for n, g in t.optimizer.state().items() if n.startswith("exp_avg/")})
    assert gradients[0].keys() == gradients[1].keys() and any("router" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-5, name


def test_a_single_micro_batch_counts_its_own_tokens_without_a_pass_ahead():
    t = trainer()
    passes = []
    t.policy.module.register_forward_hook(lambda *args: passes.append(1))
    (batch,) = pack(samples(), 1000)
    found = t.policy.next_token_loss(batch, 0.0, "batch", 0.5)[0].item()
    given = t.policy.next_token_loss(batch, 0.0, "batch", 0.5, t.policy.affinity_hits([batch]))[0].item()
    assert found == given
    passes.clear()
    t.next_token_step([batch], balance="batch", balance_weight=0.5)
    assert len(passes) == 1
    passes.clear()
    batches = pack(samples(), 40)
    t.next_token_step(batches, balance="batch", balance_weight=0.5)
    assert len(passes) == 2 * len(batches)


@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_training_on_the_balance_evens_out_the_load(kind):
    t = trainer(lr=3e-3)
    with torch.no_grad():
        for router in t.policy.module.routers():
            router.weight[:2] += 0.3
    batches = pack(samples(20), 1000)
    with_balance = [t.next_token_step(batches, balance=kind, balance_weight=1.0) for _ in range(25)]
    assert with_balance[-1]["balance_loss"] < with_balance[0]["balance_loss"]
    assert with_balance[-1]["router_max_violation"] < 0.7 * with_balance[0]["router_max_violation"]


def test_activation_checkpointing_changes_no_gradient_of_the_balance():
    gradients = []
    for recompute in (False, True):
        options = PolicyOptions(init=V3, dtype="float32", activation_checkpointing=recompute)
        policy = load_policy(options, "cpu", seed=3)
        for batch in pack(samples(), 40):
            policy.next_token_loss(batch, 0.1, "sequence", 0.5)[0].backward()
        gradients.append({n: p.grad for n, p in policy.module.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_a_balance_loss_without_a_router_is_an_error():
    llama = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    for init in (llama, {**V3, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0}):
        policy = load_policy(PolicyOptions(init=init, dtype="float32"), "cpu")
        with pytest.raises(ValueError, match="no DeepSeek-V3 model with routed experts; set balance: none"):
            policy.next_token_loss(pack(samples(), 1000)[0], 0.0, "sequence", 0.1)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_router_figures_are_those_of_the_loads():
    """MaxVio of arXiv 2408.15664, eq. 4: (max load - mean) / mean, per layer."""
    load = torch.tensor([[4, 4, 4, 4], [10, 2, 4, 0], [0, 0, 0, 0]])
    figures = router_metrics(load, [3, 4, 61])
    assert figures == {
        "router_max_violation/3": 0.0, "router_max_violation/4": 1.5, "router_max_violation": 0.75,
        "router_min_load/3": 1.0, "router_min_load/4": 0.0, "router_min_load": 0.5,
        "router_idle/3": 0.0, "router_idle/4": 0.25, "router_idle": 0.125,
    }  # fmt: skip
    assert router_metrics(torch.zeros(2, 4, dtype=torch.int64), [1, 2]) == {}


@pytest.mark.parametrize("kind", ["step", "next_token_step"])
def test_every_layers_violation_is_among_a_steps_metrics(kind):
    t = trainer(loss=LossOptions(kl_coef=0.0))
    loads = {}
    for layer, router in zip((1, 2, 3), t.policy.module.routers(), strict=True):
        router.register_forward_hook(
            lambda module, args, out, layer=layer: loads.__setitem__(layer, loads.get(layer, 0) + out.load)
        )
    documents = samples()
    if kind == "step":
        metrics = t.step([pack([dataclasses.replace(s, advantage=1.0) for s in documents], 40)])
        ran = (1, 2)  # reinforcement learning does not train the depths of multi-token prediction
    else:
        metrics = t.next_token_step(pack(documents, 40), mtp_weight=0.1)
        ran = (1, 2, 3)
    names = {f"router_max_violation/{layer}" for layer in ran}
    assert {name for name in metrics if name.startswith("router_max_violation/")} == names
    for layer in ran:
        load = loads[layer].double()
        assert metrics[f"router_max_violation/{layer}"] == pytest.approx(
            ((load.max() - load.mean()) / load.mean()).item()
        )
    mean = np.mean([metrics[name] for name in names])
    assert metrics["router_max_violation"] == pytest.approx(mean)


def test_the_bias_moves_in_next_token_steps_by_gamma():
    biases = {}
    for gamma in (0.0, 0.01):
        t = trainer(router_bias_gamma=gamma)
        t.next_token_step(pack(samples(), 1000), mtp_weight=0.1, balance="sequence", balance_weight=1e-4)
        biases[gamma] = [router.bias for router in t.policy.module.routers()]
    assert not any(bias.any() for bias in biases[0.0])
    for bias in biases[0.01]:  # the depth of multi-token prediction has a router too
        assert set(bias.abs().tolist()) <= {0.0, np.float32(0.01).item()} and bias.any()
