"""Policies, V3 and transformers: packed equals one document at a time; saved folders load elsewhere."""

import json
import logging

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, load_policy

V3 = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
QWEN2_SLIDING = {**QWEN2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
QWEN3_MOE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "head_dim": 8,
}  # fmt: skip
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}
GRANITE = {**LLAMA, "model_type": "granite", "logits_scaling": 3.0}
MAMBA = {"model_type": "mamba", "vocab_size": 96, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
TRANSFORMERS = {
    "llama": LLAMA, "qwen2-tied": QWEN2, "qwen2-sliding": QWEN2_SLIDING, "qwen3-moe": QWEN3_MOE, "gemma2": GEMMA2,
    "granite": GRANITE, "mamba": MAMBA,
}  # fmt: skip


def policy(init, **options):
    return load_policy(PolicyOptions(init=init, dtype=options.pop("dtype", "float32"), **options), "cpu", seed=3)


def samples(lengths=(20, 3, 11, 12, 7), prompt=2):
    g = torch.Generator().manual_seed(1)
    return [
        Sample(torch.randint(0, 96, (prompt,), generator=g).tolist(), torch.randint(0, 96, (n,), generator=g).tolist())
        for n in lengths
    ]


def run(policy, batches, temperature=0.8):
    """Log-probabilities in the order of the samples and the gradient of a weighted sum of them."""
    values = {}
    policy.module.zero_grad()
    for batch in batches:
        batch.temperature = temperature
        logprobs, entropy = policy.logprobs(batch, entropy=True)
        (logprobs * batch.positions).sum().backward()
        for d, index in enumerate(batch.sequence_ids.tolist()):
            rows = slice(int(batch.bounds[d]), int(batch.bounds[d + 1]))
            values[index] = torch.stack([logprobs[rows], entropy[rows]]).detach()
    grads = {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}
    return torch.cat([values[i] for i in sorted(values)], dim=1), grads


def one_by_one(all_samples):
    batches = [pack([sample], 64)[0] for sample in all_samples]
    for i, batch in enumerate(batches):
        batch.sequence_ids = torch.tensor([i])
    return batches


@pytest.mark.parametrize("name", ["v3", *TRANSFORMERS])
def test_packed_equals_unpacked_in_log_probabilities_and_gradients(name):
    p = policy(V3 if name == "v3" else TRANSFORMERS[name])
    packed, packed_grads = run(p, pack(samples(), 40))
    alone, alone_grads = run(p, one_by_one(samples()))
    assert (packed - alone).abs().max() < 1e-5
    assert packed_grads.keys() == alone_grads.keys() and len(packed_grads) > 5
    for key, grad in alone_grads.items():
        assert (packed_grads[key] - grad).abs().max() < 1e-5 * max(1.0, grad.abs().max().item()), key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_log_probabilities_are_those_of_the_model_of_transformers(name, tmp_path):
    p = policy(TRANSFORMERS[name])
    p.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    found, _ = run(p, pack(samples(), 40))
    expected = []
    for sample in samples():
        tokens = torch.tensor([[*sample.prompt_tokens, *sample.tokens]])
        with torch.no_grad():
            logprobs = (stock(tokens).logits[0, :-1] / 0.8).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        expected.append(torch.cat([torch.zeros(2), logprobs[1:]]))
    assert (found[0] - torch.cat(expected)).abs().max() < 1e-4  # eager attention: another order of sums


def test_a_v3_folder_gives_the_same_log_probabilities_in_transformers(tmp_path):
    p = policy(V3)
    p.save(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(20) * 7 % 96
    (batch,) = pack([Sample([], tokens.tolist())], 64)
    with torch.no_grad():
        found, _ = p.logprobs(batch)
        expected = stock(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    assert (found[1:] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "packed"), [("llama", True), ("qwen2-sliding", True), ("gemma2", False), ("mamba", False)]
)
def test_the_form_is_found_at_loading_and_the_slow_one_is_logged(name, packed, caplog):
    with caplog.at_level(logging.WARNING, logger="trainer.hf_policy"):
        assert policy(TRANSFORMERS[name]).packed is packed
    assert bool([r for r in caplog.records if "runs padded" in r.message]) is not packed


@pytest.mark.parametrize("initializer_range", [0.2, 1e-3])
def test_a_model_whose_layers_mix_documents_runs_padded(initializer_range):
    """Short convolutions see the tokens before them whatever the attention does, and however small the effect."""
    layers = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}
    p = policy({**LLAMA, "model_type": "lfm2", **layers, "initializer_range": initializer_range})
    assert not p.packed
    packed, _ = run(p, pack(samples(), 40))
    alone, _ = run(p, one_by_one(samples()))
    assert (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize("init", [V3, LLAMA], ids=["v3", "llama"])
def test_activation_checkpointing_changes_no_gradient(init):
    _, plain = run(policy(init), pack(samples(), 40))
    _, recomputed = run(policy(init, activation_checkpointing=True), pack(samples(), 40))
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


@pytest.mark.parametrize("init", [V3, LLAMA, QWEN2, QWEN3_MOE], ids=["v3", "llama", "qwen2-tied", "qwen3-moe"])
def test_weights_carry_the_names_and_values_of_the_saved_folder(init, tmp_path):
    p = policy(init)
    p.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours = dict(p.weights(mtp=True))
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name]) for name in ours)
    if init is V3:
        assert "model.layers.1.mlp.experts.7.gate_proj.weight" in ours
        assert not [name for name, _ in p.weights() if name.startswith("model.layers.3.")]  # the MTP layer


@pytest.mark.parametrize("init", [V3, QWEN3_MOE], ids=["v3", "qwen3-moe"])
def test_a_saved_policy_loads_back_bit_for_bit(init, tmp_path):
    p = policy(init)
    p.save(tmp_path)
    loaded = load_policy(PolicyOptions(path=str(tmp_path), dtype="float32"))
    for (name, a), (other, b) in zip(p.weights(mtp=True), loaded.weights(mtp=True), strict=True):
        assert name == other and torch.equal(a, b)
    other = load_policy(PolicyOptions(init=init, dtype="float32"), seed=4)
    other.load_weights(tmp_path)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(p.weights(True), other.weights(True), strict=True))


def test_saving_in_another_dtype_leaves_the_policy_alone(tmp_path):
    p = policy(V3)
    before = {name: tensor.clone() for name, tensor in p.weights(True)}
    p.save(tmp_path, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(stored["model.norm.weight"], before["model.norm.weight"].bfloat16())
    assert all(torch.equal(before[name], tensor) for name, tensor in p.weights(True))


def test_the_tokenizers_files_travel_with_the_policy(tmp_path):
    p = policy(LLAMA)
    p.save(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "chat_template.jinja").write_text("hello")
    load_policy(PolicyOptions(path=str(tmp_path / "a"), dtype="float32")).save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "hello"
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


def test_next_token_loss_with_mtp_is_the_mean_over_each_document_alone():
    """Cross-entropy of token t + 1 from the main head and of token t + 2 from depth 1 (arXiv 2412.19437, eq. 21-25)."""
    p = policy(V3)
    documents = samples((20, 3, 11), prompt=1)
    for sample in documents:
        sample.loss_on_prompt = True
    batches = pack(documents, 24)
    assert len(batches) > 1
    shares = [p.next_token_loss(batch, mtp_weight=0.3) for batch in batches]
    total = sum(loss.item() for loss, _ in shares)
    main = mtp = count = 0.0
    for sample in documents:
        tokens = torch.tensor([*sample.prompt_tokens, *sample.tokens])
        n = len(tokens)
        with torch.no_grad():
            args = (tokens, torch.arange(n), torch.tensor([0, n]))
            hidden = p.module(*args).hidden
            deeper = p.module.mtp(hidden, *args)[0].hidden
            main -= p.module.logits(hidden[:-1]).double().log_softmax(-1).gather(1, tokens[1:, None]).sum().item()
            mtp -= p.module.logits(deeper[:-2]).double().log_softmax(-1).gather(1, tokens[2:, None]).sum().item()
        count += n - 1
    assert total == pytest.approx((main + 0.3 * mtp) / count, rel=1e-5)
    assert sum(metrics["loss"].item() for _, metrics in shares) == pytest.approx(main / count, rel=1e-5)
    assert sum(metrics["mtp_loss"].item() for _, metrics in shares) == pytest.approx(mtp / count, rel=1e-5)


def test_replayed_routing_changes_the_result_and_minus_one_does_not():
    p = policy(V3)
    all_samples = samples()
    plain, _ = run(p, pack(all_samples, 64))
    for sample in all_samples:
        sample.routed_experts = torch.full((sample.length, 2, 2), -1, dtype=torch.int16).numpy()
    chosen, _ = run(p, pack(all_samples, 64))
    assert torch.equal(plain, chosen)
    for sample in all_samples:
        sample.routed_experts[:] = [0, 1]
    replayed, _ = run(p, pack(all_samples, 64))
    assert (replayed - plain).abs().max() > 1e-2


def test_router_load_counts_forward_passes_with_gradient_only():
    p = policy(V3)
    (batch,) = pack(samples((10, 20)), 64)
    with torch.no_grad():
        p.logprobs(batch)
    assert p.take_router_load() is None
    p.logprobs(batch)
    load = p.take_router_load()
    assert load.shape == (3, 8)  # two MoE layers and the MTP depth, which did not run
    assert load.sum(1).tolist() == [34 * 2, 34 * 2, 0]
    assert p.take_router_load() is None


def test_a_sample_longer_than_the_positions_is_an_error_that_says_so():
    (batch,) = pack(samples((80,)), 100)
    with pytest.raises(ValueError, match="82 tokens is longer than the policy's 64 positions"):
        policy(V3).logprobs(batch)


def test_mistakes_about_the_source_are_named(tmp_path):
    with pytest.raises(ValidationError, match="either path .* or init"):
        PolicyOptions()
    with pytest.raises(FileNotFoundError, match="config.json does not exist: policy.path must be"):
        load_policy(PolicyOptions(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_policy(PolicyOptions(path=str(tmp_path)))
    with pytest.raises(ValueError, match="no multi-token prediction"):
        policy(LLAMA).next_token_loss(pack(samples(), 64)[0], mtp_weight=0.1)
    with pytest.raises(ValueError, match="recipe fp8 is for DeepSeek-V3 models"):
        policy(LLAMA, recipe="fp8")


def test_weights_of_another_architecture_are_refused(tmp_path):
    policy(V3).save(tmp_path)
    with pytest.raises(ValueError, match="another architecture: .*hidden_size is 32, here 48"):
        policy({**V3, "hidden_size": 48}).load_weights(tmp_path)
    with pytest.raises(ValueError, match="another architecture: deepseek_v3, here llama"):
        policy(LLAMA).load_weights(tmp_path)
