"""The trainer: what a step computes, how many forward passes it takes, and that a resumed run is the same run."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer.checkpoint import checkpoint
from trainer.checkpoint.checkpoint import CheckpointError
from trainer.losses import LossOptions
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions
from trainer.trainer import Trainer

V3 = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
INITS = {"v3": V3, "llama": LLAMA}
ON_POLICY = LossOptions(kl_coef=0.0, clip_low=0.2, clip_high=0.2, aggregation="token")


def trainer(init=V3, loss=ON_POLICY, dtype="float32", seed=5, **optimizer):
    optimizer = OptimizerOptions(**{"lr": 1e-2, "weight_decay": 0.01, **optimizer})
    policy = PolicyOptions(init=init, dtype=dtype)
    return Trainer(policy, optimizer, loss, seed=seed, threads=1, device="cpu")


def samples(count=8, seed=0, behaviour=False):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(3, 20))
        made.append(
            Sample(
                rng.integers(0, 96, 4).tolist(), rng.integers(0, 96, n).tolist(), float(rng.normal()),
                [-4.5] * n if behaviour else None, [(0, n)],
            )
        )  # fmt: skip
    return made


def weights(t):
    return {name: tensor.clone() for name, tensor in t.weights(mtp=True)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Forwards:
    """Counts the forward passes of a policy."""

    def __init__(self, policy):
        self.count = 0
        module = getattr(policy.module, "base_model", policy.module)
        module.register_forward_hook(self._one_more)

    def _one_more(self, *_):
        self.count += 1


# --- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_an_on_policy_step_is_reinforce_with_the_given_advantages(init):
    """Gradient of -1/N sum A log p, one document at a time, in plain autograd."""
    t, plain = trainer(init), trainer(init)
    all_samples = samples()
    metrics = t.step([pack(all_samples, 40)])
    total = sum(sample.loss_tokens for sample in all_samples)
    for sample in all_samples:
        (batch,) = pack([sample], 64)
        (-(sample.advantage * plain.policy.logprobs(batch)[0]).sum() / total).backward()
    update = plain.optimizer.step()
    assert metrics["ratio"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] == pytest.approx(update["grad_norm"], rel=1e-5)
    for (name, a), (_, b) in zip(t.weights(), plain.weights(), strict=True):
        assert (a - b).abs().max() < 2e-4, name  # AdamW's first step is lr * sign(gradient): tiny ones may differ


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_packing_into_other_micro_batches_changes_no_gradient(init, aggregation):
    """Without momentum the optimizer's first moment after a step is the step's gradient."""
    gradients = []
    for budget in (24, 1000):
        loss = ON_POLICY.model_copy(update={"aggregation": aggregation})
        t = trainer(init, loss, betas=(0.0, 0.95), max_grad_norm=1e9)
        t.step([pack(samples(), budget)])
        gradients.append({n: g for n, g in t.optimizer.state().items() if n.startswith("exp_avg/")})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-5, name


def test_a_step_on_policy_takes_one_forward_pass_per_micro_batch():
    t = trainer()
    forwards = Forwards(t.policy)
    batches = pack(samples(), 40)
    t.step([batches])
    assert forwards.count == len(batches) > 1


def test_only_minibatches_after_the_first_need_a_pass_for_old_log_probabilities():
    t = trainer()
    forwards = Forwards(t.policy)
    minibatches = [pack(samples(4, seed), 64) for seed in range(3)]
    sizes = [len(minibatch) for minibatch in minibatches]
    t.step(minibatches)
    assert forwards.count == sum(sizes) + sum(sizes[1:])


def test_a_second_epoch_reuses_the_first_ones_log_probabilities():
    t = trainer()
    forwards = Forwards(t.policy)
    batches = pack(samples(), 64)
    metrics = t.step([batches, batches])
    assert forwards.count == 2 * len(batches)
    assert metrics["updates"] == 2.0 and metrics["ratio"] != 1.0
    assert all(batch.old_logprobs is None for batch in batches)  # the caller's batches are not changed


def test_old_log_probabilities_are_those_before_the_first_update():
    computed, given = trainer(), trainer()
    minibatches = [pack(samples(4, seed), 64) for seed in range(3)]
    computed.step(minibatches)
    for minibatch in minibatches:
        for batch, old in zip(minibatch, given.logprobs(minibatch), strict=True):
            batch.old_logprobs = old
    given.step(minibatches)
    for (name, a), (_, b) in zip(computed.weights(), given.weights(), strict=True):
        assert (a - b).abs().max() < 1e-5, name


def test_metrics_are_means_over_all_tokens_whatever_the_packing():
    found = []
    for budget in (24, 1000):
        t = trainer(loss=LossOptions(kl_coef=0.1, aggregation="token"))
        t.step([pack(samples(seed=1), budget)])  # away from the reference
        found.append(t.step([pack(samples(behaviour=True), budget)]))
    assert found[0].keys() == found[1].keys() >= {"entropy", "gap", "kl_reference", "policy_loss", "grad_norm", "lr"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-3, abs=1e-5), name


def test_an_empty_minibatch_makes_no_update():
    t = trainer()
    before = weights(t)
    assert t.step([[]]) == {"updates": 0.0} and t.step([]) == {"updates": 0.0}
    assert same(before, weights(t)) and t.optimizer.steps == 0


def test_learning_raises_the_probability_of_what_was_rewarded():
    t = trainer()
    good, bad = samples(2)
    good.advantage, bad.advantage = 1.0, -1.0
    sequences = [[*s.prompt_tokens, *s.tokens] for s in (good, bad)]
    before = [scores[4:].sum() for scores in t.score(sequences)]
    for _ in range(5):
        t.step([pack([good, bad], 64)])
    after = [scores[4:].sum() for scores in t.score(sequences)]
    assert after[0] > before[0] and after[1] < before[1]


# --- the reference ---------------------------------------------------------------------------------------------------


def test_a_reference_exists_only_where_a_kl_needs_it():
    assert trainer().reference is None
    with pytest.raises(ValueError, match="no reference model"):
        trainer().logprobs([], reference=True)
    with pytest.raises(ValueError, match="no reference model"):
        trainer().refresh_reference()


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_the_reference_stays_until_it_is_refreshed(init):
    t = trainer(init, LossOptions(kl_coef=0.01))
    batches = pack(samples(), 64)
    start = t.logprobs(batches)
    assert t.step([batches])["kl_reference"] == pytest.approx(0.0, abs=1e-7)
    assert t.step([batches])["kl_reference"] > 1e-5
    assert all(torch.equal(a, b) for a, b in zip(start, t.logprobs(batches, reference=True), strict=True))
    t.refresh_reference()
    now = t.logprobs(batches)
    assert all(torch.equal(a, b) for a, b in zip(now, t.logprobs(batches, reference=True), strict=True))
    assert not torch.equal(now[0], start[0])


# --- language modelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_next_token_steps_learn_a_text_by_heart(dtype):
    t = trainer(loss=None, dtype=dtype, router_bias_gamma=1e-3)
    documents = [Sample((), s.tokens, loss_on_prompt=True) for s in samples(6)]
    first = t.next_token_step(pack(documents, 40), mtp_weight=0.3)
    assert first["tokens"] == sum(len(d.tokens) - 1 for d in documents)
    for _ in range(60):
        last = t.next_token_step(pack(documents, 40), mtp_weight=0.3)
    assert first["loss"] > 4 and first["mtp_loss"] > 4
    assert last["loss"] < 0.5 and last["mtp_loss"] < 1.0


def test_the_router_bias_moves_against_the_load_by_gamma():
    frozen = trainer(loss=None)
    moving = trainer(loss=None, router_bias_gamma=0.01)
    batches = pack([Sample((), s.tokens, loss_on_prompt=True) for s in samples(20)], 64)
    router = moving.policy.module.routers()[0]
    loads = []
    router.register_forward_hook(lambda *args: loads.append(args[2].load))
    for t in (frozen, moving):
        t.next_token_step(batches)
    load = sum(loads).double()
    assert torch.equal(router.bias.double(), (0.01 * torch.sign(load.mean() - load)).float().double())
    assert not frozen.policy.module.routers()[0].bias.any()


# --- scores, weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_scores_are_the_log_probabilities_of_every_token(init, tmp_path):
    t = trainer(init)
    sequences = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3]]
    found = t.score(sequences, temperature=0.5)
    t.policy.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for sequence, scores in zip(sequences, found, strict=True):
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            expected = (stock(tokens).logits[0, :-1] / 0.5).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert scores[0] == 0.0 and scores.dtype == np.float32
        np.testing.assert_allclose(scores[1:], expected.numpy(), atol=1e-4)


def test_weights_on_a_cpu_are_the_live_ones():
    t = trainer()
    before = dict(t.weights())
    with torch.no_grad():
        t.policy.module.norm.weight[3] += 1e-6
    assert before["model.norm.weight"][3] != 1.0  # no copy was made


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _train(t, steps):
    """Steps of every kind, each a function of its number alone."""
    metrics = []
    for step in steps:
        if t.loss is None or step % 3 == 2:
            documents = [Sample((), s.tokens, loss_on_prompt=True) for s in samples(5, 100 + step)]
            mtp = 0.1 if hasattr(t.policy.module, "mtp") else 0.0
            metrics.append(t.next_token_step(pack(documents, 40), mtp_weight=mtp))
        else:
            metrics.append(t.step([pack(samples(5, 2 * step + i, behaviour=True), 40) for i in range(2)]))
        if t.reference is not None and step == 1:
            t.refresh_reference()
    return metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INITS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, dtype, tmp_path):
    options = {
        "init": INITS[name], "loss": LossOptions(kl_coef=0.05), "dtype": dtype, "schedule": "cosine", "total_steps": 12,
        "router_bias_gamma": 0.0 if name == "llama" else 1e-3,
    }  # fmt: skip
    whole = trainer(**options)
    metrics = _train(whole, range(6))
    first = trainer(**options)
    _train(first, range(3))
    first.save(tmp_path / "step-3", {"position": 17, "seen": ["a"]})
    second = trainer(**options)
    torch.rand(3)  # whatever happened meanwhile
    assert second.load(tmp_path / "step-3") == {"position": 17, "seen": ["a"]}
    assert same(weights(first), weights(second))
    assert _train(second, range(3, 6)) == metrics[3:]
    assert same(weights(whole), weights(second))
    states = (whole.optimizer.state(), second.optimizer.state())
    assert same(*({k: v.clone() for k, v in state.items()} for state in states))
    batches = pack(samples(), 64)
    pairs = zip(whole.logprobs(batches, True), second.logprobs(batches, True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_random_state_is_part_of_a_checkpoint(tmp_path):
    t = trainer()
    t.save(tmp_path / "step-1")
    expected = torch.rand(4)
    t.load(tmp_path / "step-1")
    assert torch.equal(torch.rand(4), expected)


def test_a_checkpoint_is_a_hugging_face_folder_with_the_rest_aside(tmp_path):
    t = trainer()
    t.step([pack(samples(), 64)])
    t.save(tmp_path / "step-1")
    assert [p.name for p in (tmp_path / "step-1").glob("*.safetensors")] == ["model.safetensors"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1", dtype=torch.float32)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(stock.state_dict()[name], dict(t.weights())[name])
    options = PolicyOptions(path=str(tmp_path / "step-1"), dtype="float32")
    again = Trainer(options, OptimizerOptions(), None, device="cpu")
    assert same(weights(t), weights(again))


def test_checkpoints_of_other_architectures_and_foreign_folders_are_refused(tmp_path):
    trainer(V3).save(tmp_path / "v3")
    trainer(LLAMA).save(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="cannot resume from .*another architecture: .*vocab_size is 96, here 80"):
        trainer({**V3, "vocab_size": 80}).load(tmp_path / "v3")
    with pytest.raises(CheckpointError, match="another architecture: deepseek_v3, here llama"):
        trainer(LLAMA).load(tmp_path / "v3")
    with pytest.raises(CheckpointError, match="cannot resume from .*'llama', expected 'deepseek_v3'"):
        trainer(V3).load(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="missing master/"):
        trainer(LLAMA, dtype="bfloat16").load(tmp_path / "llama")
    trainer(V3).policy.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="Hugging Face folder without a trainer's state"):
        trainer(V3).load(tmp_path / "plain")


def test_a_damaged_checkpoint_is_found_before_anything_is_loaded(tmp_path):
    t = trainer()
    t.save(tmp_path / "step-1")
    path = tmp_path / "step-1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    t.step([pack(samples(), 64)])
    before = weights(t)
    with pytest.raises(CheckpointError, match="model.safetensors is not what was written"):
        t.load(tmp_path / "step-1")
    assert same(before, weights(t))


def test_state_that_cannot_be_json_leaves_the_earlier_checkpoint(tmp_path):
    t = trainer()
    t.save(tmp_path / "step-1", {"a": 1})
    with pytest.raises(TypeError):
        t.save(tmp_path / "step-1", {"a": object()})
    assert json.loads((tmp_path / "step-1" / checkpoint.STATE / "state.json").read_text())["caller"] == {"a": 1}


def test_fresh_weights_depend_on_the_seed_alone():
    assert same(weights(trainer(seed=1)), weights(trainer(seed=1)))
    assert not same(weights(trainer(seed=1)), weights(trainer(seed=2)))
    assert same(weights(trainer(LLAMA, seed=1)), weights(trainer(LLAMA, seed=1)))


def test_a_trainer_without_a_loss_says_what_it_can_do():
    with pytest.raises(ValueError, match="only next_token_step"):
        trainer(loss=None).step([pack(samples(), 64)])
    with pytest.raises(ValueError, match="no batches"):
        trainer(loss=None).next_token_step([])
