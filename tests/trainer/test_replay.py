"""Routing replay: the experts an engine used are used in the forward and the backward pass, from record to step."""

import numpy as np
import pytest
import torch

from rewards.score import Score
from rlzero.config.rl import Algorithm, Reward
from rlzero.data import dump
from rlzero.rl.groups import Group, grade, to_samples
from rollout.engine import Prompt, Rollout
from trainer.losses import LossOptions
from trainer.model.moe import Router, agreement
from trainer.model.v3_config import V3Config
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack, to_device
from trainer.policy import PolicyOptions, load_policy
from trainer.trainer import Trainer

V3 = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "n_group": 4,
    "topk_group": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LAYERS, K = 2, 2


def policy(bias=0.0, init=V3, **options):
    """`bias` moves the routers' choices, and nothing else: it selects and never weighs."""
    made = load_policy(PolicyOptions(init=init, dtype="float32", **options), "cpu", seed=3)
    generator = torch.Generator().manual_seed(7)
    for router in made.module.routers()[:LAYERS]:
        router.bias.copy_(bias * torch.randn(len(router.bias), generator=generator))
    return made


def samples(lengths=(20, 3, 11, 12, 7), vocabulary=96):
    rng = np.random.default_rng(1)
    return [
        Sample(rng.integers(0, vocabulary, 2).tolist(), rng.integers(0, vocabulary, n).tolist(), 1.0) for n in lengths
    ]


def record(made, all_samples):
    """Gives every sample the experts that `made` chooses for it, as an engine reports them: int16, by token."""
    for sample in all_samples:
        (batch,) = pack([sample], 64)
        with torch.no_grad():
            out = made.module(batch.tokens, batch.positions, batch.bounds)
        sample.routed_experts = out.experts.to(torch.int16).numpy()
    return all_samples


def gradients(made, all_samples, loss="logprobs"):
    made.module.zero_grad()
    value = 0.0
    for batch in pack(all_samples, 40):
        if loss == "logprobs":
            part = (made.logprobs(batch)[0] * batch.positions).sum()
        else:
            part = made.next_token_loss(batch, mtp_weight=0.3)[0]
        part.backward()
        value += part.item()
    return value, {n: p.grad.clone() for n, p in made.module.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", ["logprobs", "next token and two depths"])
def test_replay_gives_the_gradient_of_the_run_whose_router_chose_so(loss, recompute):
    """The recorded run has biases that send tokens elsewhere; replayed without them, every bit is the same. The depths
    of multi-token prediction, which no engine reports, route by themselves, and alike in both."""
    chosen = policy(bias=0.5)
    recorded = record(chosen, samples())
    plain = samples()
    same(gradients(policy(activation_checkpointing=recompute), recorded, loss), gradients(chosen, plain, loss))
    free = gradients(policy(), plain, loss)
    assert abs(free[0] - gradients(chosen, plain, loss)[0]) > 1e-3  # without replay it is another run


def test_rows_of_minus_one_are_the_routers_and_the_others_the_records():
    """Half of the tokens replayed: the same as biases that hold for those tokens only."""
    chosen, free = policy(bias=0.5), policy()
    recorded = record(chosen, samples())
    for sample in recorded:
        sample.routed_experts[1::2] = -1
    seen = {"partial": [], "whole": []}
    for router in free.module.routers()[:LAYERS]:
        router.register_forward_hook(lambda layer, args, out: seen[now].append(out.experts))
    now = "partial"
    found = gradients(free, recorded)
    # the whole of what was then used, given as a record, is the same run
    whole = samples()
    batches = pack(recorded, 40)
    for b, batch in enumerate(batches):
        used = torch.stack(seen["partial"][LAYERS * b : LAYERS * (b + 1)], dim=1)
        replayed = batch.routed_experts[:, 0, 0] >= 0
        assert torch.equal(used[replayed], batch.routed_experts[replayed].long())
        for d, index in enumerate(batch.sequence_ids.tolist()):
            rows = slice(int(batch.bounds[d]), int(batch.bounds[d + 1]))
            whole[index].routed_experts = used[rows].to(torch.int16).numpy()
    now = "whole"
    same(gradients(free, whole), found)
    own = policy()
    assert gradients(own, samples())[0] != found[0]


def test_a_sample_without_a_record_beside_one_with_it_routes_itself():
    recorded = record(policy(bias=0.5), samples())
    mixed = [recorded[0], *samples()[1:]]
    found = gradients(policy(), mixed)
    parts = [gradients(policy(), [recorded[0]]), gradients(policy(), samples()[1:])]
    for name, gradient in found[1].items():
        assert (gradient - parts[0][1][name] - parts[1][1][name]).abs().max() < 1e-4, name


def test_a_step_of_reinforcement_learning_replays_in_old_and_new_and_not_in_the_reference():
    options = OptimizerOptions(lr=1e-2)
    made = Trainer(PolicyOptions(init=V3, dtype="float32"), options, LossOptions(kl_coef=0.1), seed=3, device="cpu")
    recorded = record(policy(bias=0.5), samples())
    minibatches = [pack(recorded[:3], 64), pack(recorded[3:], 64)]
    assert made.logprobs(minibatches[0])[0].sum() != made.logprobs(minibatches[0], reference=True)[0].sum()
    free = pack(samples()[:3], 64)
    assert torch.equal(made.logprobs(free)[0], made.logprobs(minibatches[0], reference=True)[0])
    metrics = made.step(minibatches[:1])
    assert metrics["ratio"] == 1.0 and metrics["kl_reference"] > 1e-4


def test_agreement_is_counted_token_by_token():
    own = torch.tensor([[0, 1], [0, 1], [2, 3], [4, 5], [6, 7]])
    replay = torch.tensor([[1, 0], [0, 2], [3, 2], [-1, 5], [1, 2]], dtype=torch.int16)
    # the first and the third are the same sets, the second shares one expert, the fourth is not known
    assert agreement(own, replay).tolist() == [4, 2, 5]


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), [(256, 8, 4, 8), (32, 4, 2, 4), (48, 3, 2, 4)])
def test_agreement_on_a_gpu_is_that_of_plain_operations_and_the_host_does_not_wait(experts, groups, kept, k):
    """Three groups are no power of two: there the kernel of the router does not run."""
    init = {**V3, "n_routed_experts": experts, "num_experts_per_tok": k, "n_group": groups, "topk_group": kept}
    torch.manual_seed(0)
    router = Router(V3Config.from_hf({"model_type": "deepseek_v3", **init})).to("cuda", torch.bfloat16)
    router.weight.data.normal_()
    router.bias.uniform_(-0.1, 0.1)
    x = torch.randn(5000, V3["hidden_size"], device="cuda", dtype=torch.bfloat16)
    own = router(x).experts
    replay = own.flip(1).to(torch.int16)
    replay[1000:3000, 0] = torch.randint(0, experts, (2000,), device="cuda", dtype=torch.int16)
    replay[4000:4500, 1] = -1
    router(x, replay)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = router(x, replay).agreement
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, agreement(own, replay)) and found[0] == 4500 and 2500 <= found[1] < 4500


def test_a_step_says_how_well_the_router_agrees_with_the_engine():
    """Against the routers' own choices in a pass of their own, token by token in plain Python; two minibatches, of
    which the first also gives the second its old log-probabilities, in a pass that is not counted."""
    options = OptimizerOptions(lr=0.0)  # the second minibatch meets the same policy
    made = Trainer(PolicyOptions(init=V3, dtype="float32"), options, LossOptions(), seed=3, device="cpu")
    recorded = record(policy(bias=0.02), samples())  # another seed's weights: some choices are equal, some are not
    for sample in recorded:
        sample.routed_experts[-1] = -1
    equal = common = count = 0
    for sample in recorded:
        (batch,) = pack([sample], 64)
        own = []
        hooks = [
            router.register_forward_hook(lambda layer, args, out, own=own: own.append(layer._decide(args[0], None)[2]))
            for router in made.policy.module.routers()[:LAYERS]
        ]
        made.logprobs([batch])
        for hook in hooks:
            hook.remove()
        for layer, chosen in enumerate(own):
            for token, row in enumerate(chosen.tolist()[:-1]):
                theirs = set(sample.routed_experts[token, layer].tolist())
                equal, common, count = equal + (theirs == set(row)), common + len(theirs & set(row)), count + 1
    metrics = made.step([pack(recorded[:3], 40), pack(recorded[3:], 40)])
    assert 0 < equal < count
    assert metrics["router_agreement"] == equal / count and metrics["router_overlap"] == common / (K * count)


def test_a_step_without_a_record_says_nothing_of_agreement():
    made = Trainer(PolicyOptions(init=V3, dtype="float32"), OptimizerOptions(), LossOptions(), seed=3, device="cpu")
    assert not [name for name in made.step([pack(samples(), 64)]) if name.startswith(("router_agree", "router_over"))]


def test_the_router_of_the_engine_agrees_with_itself():
    made = Trainer(PolicyOptions(init=V3, dtype="float32"), OptimizerOptions(), LossOptions(), seed=3, device="cpu")
    metrics = made.step([pack(record(made.policy, samples()), 64)])
    assert metrics["router_agreement"] == metrics["router_overlap"] == 1.0


def test_the_experts_of_a_large_model_survive_the_way_from_the_rollout_to_the_model(tmp_path):
    """256 experts do not fit in 8 bits; a record goes through a dump, a sample, a batch and to the device as int16."""
    init = {**V3, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    made = policy(init=init)
    rng = np.random.default_rng(0)
    prompt, tokens = (1, 2, 3), [4, 5, 6, 7]
    routed = np.stack([rng.permutation(256)[: LAYERS * 8].reshape(LAYERS, 8) for _ in range(7)]).astype(np.int16)
    routed[0, 0, 0], routed[0, 1, 0] = 255, 128
    routed[0, 0, 1:] = np.arange(7)
    routed[-1] = -1  # the last token sampled was never read by the engine
    rollout = Rollout("a", 0, prompt, tokens, [-1.0] * 4, [(0, 4)], "stop", "x", routed)
    dump.save(tmp_path / "d.jsonl", [Group(Prompt("a", "q", prompt), [rollout], [[Score(1.0, "correct")]])])
    specs = (Reward(fn="a:b"),)
    algorithm = Algorithm(advantage="reinforce_pp")
    (sample,) = to_samples(grade(dump.load(tmp_path / "d.jsonl"), specs, algorithm, 8), algorithm)
    (batch,) = pack([sample], 64)
    assert batch.routed_experts.dtype == torch.int16
    assert to_device(batch, torch.device("meta")).routed_experts.dtype == torch.int16  # 2 bytes over the wire
    used = []
    for router in made.module.routers()[:LAYERS]:
        router.register_forward_hook(lambda layer, args, out: used.append(out.experts))
    made.logprobs(batch)
    assert torch.equal(torch.stack(used, dim=1)[:-1], torch.from_numpy(routed[:-1]).long())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routed: routed + 7, "routed_experts from 7 to 14; this policy has experts 0 to 7"),
        (lambda routed: routed * 0 - 2, "routed_experts from -2 to -2"),
        (lambda routed: routed[:, :1], r"routed_experts of shape \[63, 1, 2\], expected \[63, 2, 2\]"),
    ],
)
def test_a_record_of_another_model_is_an_error(change, message):
    recorded = record(policy(), samples())
    for sample in recorded:
        sample.routed_experts = change(sample.routed_experts)
    (batch,) = pack(recorded, 100)
    for call in (lambda: policy().logprobs(batch), lambda: policy().next_token_loss(batch)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_record_for_a_policy_of_transformers_is_an_error():
    llama = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (batch,) = pack(record(policy(), samples()), 100)
    with pytest.raises(ValueError, match="routing is replayed in DeepSeek-V3 models only"):
        load_policy(PolicyOptions(init=llama, dtype="float32"), "cpu").logprobs(batch)
