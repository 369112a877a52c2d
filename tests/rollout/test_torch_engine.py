"""The torch engine against transformers' own forward pass, and its promises about noise, batches, updates and sleep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rollout.engine import Request, Sampling, generate
from rollout.torch import sampler
from rollout.torch.engine import EngineUnusable, TorchEngine
from rollout.torch.native import library
from trainer.checkpoint.folder import FolderReader

VOCAB = 97
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.7, "rope_theta": 10000.0,
}  # fmt: skip
V3 = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
    routed_scaling_factor=1.5, kv_lora_rank=128, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=12,
    v_head_dim=12, n_group=1, topk_group=1, first_k_dense_replace=1, max_position_embeddings=256,
    num_nextn_predict_layers=0, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip
VARIANTS = {
    "folded": {},  # kv_lora 128 > hidden 32: the native kernels merge W_DKV with W_UK and W_UV
    "plain": dict(kv_lora_rank=16),
    "q_lora_groups": dict(q_lora_rank=12, kv_lora_rank=24, n_group=4, topk_group=2, num_experts_per_tok=3),
    "odd_sizes": dict(hidden_size=36, num_attention_heads=7, v_head_dim=10, moe_intermediate_size=20, kv_lora_rank=18),
    "yarn_tied": dict(rope_parameters=YARN, tie_word_embeddings=True, first_k_dense_replace=0),
    "halves_two_shared": dict(rope_interleave=False, n_shared_experts=2, norm_topk_prob=False),
    "dense": dict(first_k_dense_replace=3),
}
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
)  # fmt: skip


def make_v3(folder, seed=0, **changes):
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(V3 | changes))).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    model.save_pretrained(folder)
    return model


def make_small(folder, config, model, seed=0, **changes):
    torch.manual_seed(seed)
    made = model(config(**(SMALL | changes))).eval()
    made.save_pretrained(folder)
    return made


def add_tokenizer(folder):
    """Characters as tokens, `Ġ`-free: what is decoded is what was written."""
    letters = ["<s>", "</s>"] + [chr(33 + i) for i in range(VOCAB - 3)] + [" "]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v3")
    make_v3(path)
    add_tokenizer(path)
    return path


def requests(prompts=4, samples=3, tokens=12, seed=5, **sampling):
    random = np.random.default_rng(3)
    sampling = Sampling(tokens, **({"ignore_eos": True, "seed": seed} | sampling))
    drawn = [tuple(random.integers(2, VOCAB, random.integers(3, 11)).tolist()) for _ in range(prompts)]
    return [Request(f"p{i}", s, prompt, sampling) for i, prompt in enumerate(drawn) for s in range(samples)]


def reference_logprobs(model, tokens, temperature=1.0):
    """log_softmax(logits / temperature) of every token but the first, by transformers' uncached forward, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()


def assert_matches(model, rollouts, bound, temperature=1.0):
    for r in rollouts:
        reference = reference_logprobs(model, [*r.prompt_tokens, *r.tokens], temperature)[len(r.prompt_tokens) - 1 :]
        assert np.abs(reference - np.array(r.logprobs)).max() < bound


DECODERS = [("latent", "torch"), ("expanded", "torch"), ("expanded", "native")]


@pytest.mark.parametrize("cache, kernels", DECODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_are_those_of_transformers(tmp_path, variant, cache, kernels):
    model = make_v3(tmp_path, **VARIANTS[variant])
    engine = TorchEngine(tmp_path, cache=cache, kernels=kernels, max_batch=5)
    rollouts = generate(engine, requests(temperature=0.8))
    assert_matches(model, rollouts, 2e-5, temperature=0.8)


TOP_2 = {"num_experts_per_tok": 2}
OTHERS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen_tied": (Qwen3Config, Qwen3ForCausalLM, dict(tie_word_embeddings=True)),
    "sliding": (MistralConfig, MistralForCausalLM, dict(sliding_window=6)),
    "mixture": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"moe_intermediate_size": 16, "num_experts": 4} | TOP_2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_logprobs_of_other_causal_models(tmp_path, name):
    config, model, changes = OTHERS[name]
    reference = make_small(tmp_path, config, model, **changes)
    engine = TorchEngine(tmp_path, max_batch=5)
    assert_matches(reference, generate(engine, requests()), 2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_causal_models_sleep_and_take_updates(tmp_path, name):
    config, model, changes = OTHERS[name]
    make_small(tmp_path / "a", config, model, **changes)
    other = make_small(tmp_path / "b", config, model, seed=1, **changes)
    engine = TorchEngine(tmp_path / "a", max_batch=5)
    engine.update(FolderReader(tmp_path / "b"), version=1)
    engine.sleep()
    assert not list(engine.decoder.weights())
    engine.wake()
    assert_matches(other, generate(engine, requests(2, 2)), 2e-5)
    with pytest.raises(ValueError, match="missing: model.norm.weight"):
        engine.update(((n, t) for n, t in FolderReader(tmp_path / "b") if n != "model.norm.weight"), version=2)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_end_at_different_times_leave_the_others_right(tmp_path, name):
    config, model, changes = OTHERS[name]
    reference = make_small(tmp_path, config, model, **changes)
    asked = [replace(r, sampling=replace(r.sampling, max_tokens=3 + 4 * i)) for i, r in enumerate(requests())]
    rollouts = generate(TorchEngine(tmp_path, max_batch=5), asked)
    assert [len(r.tokens) for r in rollouts] == [3 + 4 * i for i in range(12)]
    assert_matches(reference, rollouts, 2e-5)


def test_score_is_the_uncached_forward(folder):
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    sequences = [[5, 9, 13, 60, 2], [7, 8], [3] * 30]
    for tokens, scores in zip(sequences, TorchEngine(folder).score(sequences, temperature=0.7), strict=True):
        assert scores[0] == 0.0 and len(scores) == len(tokens)
        assert np.abs(scores[1:] - reference_logprobs(model, tokens, 0.7)).max() < 2e-5


def test_bfloat16_weights_stay_near_the_float32_forward(folder):
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    differences = []
    for r in generate(TorchEngine(folder, dtype="bfloat16"), requests()):
        reference = reference_logprobs(model, [*r.prompt_tokens, *r.tokens])[len(r.prompt_tokens) - 1 :]
        differences.append(np.abs(reference - np.array(r.logprobs)).mean())
    assert np.mean(differences) < 0.1  # weights of std 0.2 exaggerate bfloat16's rounding


@pytest.mark.parametrize("cache, kernels", DECODERS)
def test_completions_do_not_depend_on_the_batch(folder, cache, kernels):
    asked = requests()
    together = generate(TorchEngine(folder, cache=cache, kernels=kernels), asked)
    narrow = generate(TorchEngine(folder, cache=cache, kernels=kernels, max_batch=2), asked[::-1])[::-1]
    for a, b in zip(together, narrow, strict=True):
        assert a.tokens == b.tokens
        assert np.abs(np.array(a.logprobs) - np.array(b.logprobs)).max() < 1e-5


def test_native_logits_have_the_same_bits_in_every_batch(folder):
    """Alone or together, prefilled or decoded, on one thread or two."""
    engine = TorchEngine(folder)
    rollouts = generate(engine, requests(prompts=5, samples=4, tokens=20))
    sequences = [[*r.prompt_tokens, *r.tokens] for r in rollouts]
    engine.decoder.threads = 2
    together = engine.score(sequences)
    for r, sequence, scores in zip(rollouts, sequences, together, strict=True):
        assert (engine.score([sequence])[0] == scores).all()
        assert np.abs(scores[-20:] - np.array(r.logprobs, np.float32)).max() < 1e-6  # the same logits, another softmax


def test_auto_takes_native_kernels_only_where_they_fit(folder, tmp_path):
    make_v3(tmp_path, kv_lora_rank=16)  # the latent is smaller than 4 heads x (12 + 12)
    assert type(TorchEngine(folder).decoder).__name__ == "NativeDecoder"
    assert type(TorchEngine(tmp_path).decoder).__name__ == "V3Decoder"
    assert type(TorchEngine(folder, dtype="bfloat16").decoder).__name__ == "V3Decoder"
    with pytest.raises(ValueError, match="native kernels compute float32"):
        TorchEngine(folder, dtype="bfloat16", kernels="native")


def test_without_a_compiler_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(library.CompilerMissing, match="need a C\\+\\+ compiler.*kernels='torch'"):
        library.build()


def test_seed_prompt_and_sample_key_the_noise(folder):
    prompt = (5, 6, 7)
    asked = [
        Request(prompt_id, sample, prompt, Sampling(16, seed=seed, ignore_eos=True))
        for seed, prompt_id, sample in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    engine = TorchEngine(folder)
    assert len({tuple(generate(engine, [request])[0].tokens) for request in asked}) == 4


@pytest.mark.parametrize("cache, kernels", DECODERS)
def test_an_interrupted_rollout_continues_as_if_nothing_had_happened(folder, cache, kernels):
    asked = requests(tokens=20)
    whole = generate(TorchEngine(folder, cache=cache, kernels=kernels), asked)
    engine = TorchEngine(folder, max_batch=7, cache=cache, kernels=kernels)
    engine.submit(asked)
    for _ in range(6):
        engine._step()
    stopped = engine.interrupt()
    assert len(stopped) == len(asked) and all(r.finish_reason == "interrupted" for r in stopped)
    assert {len(r.tokens) for r in stopped} == {0, 7}  # rows that ran (one token at admission) and those that waited
    partial = {r.id: r for r in stopped}
    again = generate(engine, [replace(r, partial=partial[r.id]) for r in asked])
    for a, b in zip(whole, again, strict=True):
        assert a.tokens == b.tokens and b.finish_reason == "length" and b.versions == [(0, 20)]
        bound = 0.0 if kernels == "native" else 1e-5
        assert np.abs(np.array(a.logprobs) - np.array(b.logprobs)).max() <= bound


@pytest.mark.parametrize("cache, kernels", DECODERS)
def test_interrupting_some_leaves_the_others_as_they_were(folder, cache, kernels):
    asked = requests(tokens=20)
    whole = {r.id: r for r in generate(TorchEngine(folder, cache=cache, kernels=kernels), asked)}
    engine = TorchEngine(folder, max_batch=7, cache=cache, kernels=kernels)
    engine.submit(asked)
    for _ in range(6):
        engine._step()
    only = {r.id for i, r in enumerate(asked) if i % 3}
    stopped = engine.interrupt({*only, "nobody/0"})
    assert {r.id for r in stopped} == only and {len(r.tokens) for r in stopped} == {0, 7}
    left = []
    while ended := engine.completed():
        left += ended
    assert {r.id for r in left} == whole.keys() - only
    bound = 0.0 if kernels == "native" else 1e-5
    for r in left:
        assert r.tokens == whole[r.id].tokens
        assert np.abs(np.array(r.logprobs) - np.array(whole[r.id].logprobs)).max() <= bound


def test_versions_say_which_policy_sampled_each_token(folder):
    engine = TorchEngine(folder)
    asked = requests(prompts=1, samples=2, tokens=10)
    engine.submit(asked)
    for _ in range(3):
        engine._step()
    engine.update(FolderReader(folder), version=4)
    rollouts = []
    while len(rollouts) < 2:
        rollouts += engine.completed()
    assert [r.versions for r in rollouts] == [[(0, 4), (4, 6)]] * 2
    # The weights did not change, so a running request must not notice: it kept its cache.
    unbroken = generate(TorchEngine(folder), asked)
    assert [r.tokens for r in rollouts] == [r.tokens for r in unbroken]


def test_running_requests_keep_the_old_cache_over_an_update(folder, tmp_path):
    make_v3(tmp_path, seed=1)
    engine, fresh = TorchEngine(folder), TorchEngine(tmp_path)
    (asked,) = requests(prompts=1, samples=1, tokens=10)
    engine.submit([asked])
    for _ in range(4):
        engine._step()
    engine.update(FolderReader(tmp_path), version=1)
    (mixed,) = engine.completed()
    scored = fresh.score([[*mixed.prompt_tokens, *mixed.tokens]])[0][-5:]
    assert np.abs(scored - np.array(mixed.logprobs[-5:])).max() > 1e-3  # old keys and values, new weights


def test_after_an_update_the_engine_is_a_fresh_engine_on_the_new_weights(folder, tmp_path):
    make_v3(tmp_path, seed=1)
    add_tokenizer(tmp_path)
    engine = TorchEngine(folder)
    generate(engine, requests())
    engine.update(FolderReader(tmp_path), version=1)
    assert generate(engine, requests()) == generate(TorchEngine(tmp_path, version=1), requests())


def test_weights_given_to_an_update_may_change_afterwards(folder):
    engine = TorchEngine(folder)
    weights = dict(FolderReader(folder))
    engine.update(weights.items(), version=1)
    before = engine.score([[4, 5, 6, 7]])[0]
    for tensor in weights.values():
        tensor.add_(1.0)
    assert (engine.score([[4, 5, 6, 7]])[0] == before).all()


@pytest.mark.parametrize("fault", ["stops", "missing", "shape", "unexpected"])
def test_a_failed_update_poisons_until_a_full_one_succeeds(folder, fault):
    engine = TorchEngine(folder)
    weights = dict(FolderReader(folder))
    if fault == "missing":
        del weights["model.norm.weight"], weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    if fault == "shape":
        weights["lm_head.weight"] = torch.zeros(2, 2)
    if fault == "unexpected":
        weights["model.layers.9.surprise.weight"] = torch.zeros(2)

    def arriving():
        for i, item in enumerate(weights.items()):
            if fault == "stops" and i == 5:
                raise ConnectionError("the trainer went away")
            yield item

    with pytest.raises((ValueError, ConnectionError)) as error:
        engine.update(arriving(), version=1)
    named = {
        "stops": "went away", "missing": "experts.3.up_proj", "shape": r"lm_head.weight: found [2, 2]",
        "unexpected": "layers.9.surprise",
    }  # fmt: skip
    assert named[fault] in str(error.value)
    for call in (lambda: engine.submit(requests()), engine.completed, lambda: engine.score([[1, 2]]), engine.interrupt):
        with pytest.raises(EngineUnusable, match="update to version 1"):
            call()
    engine.update(FolderReader(folder), version=2)
    assert generate(engine, requests(1, 1))[0].versions == [(2, 12)]


def test_tokens_end_at_eos_stop_string_or_length(folder):
    engine = TorchEngine(folder)
    free = generate(engine, requests(prompts=6, tokens=60, ignore_eos=False))
    assert {r.finish_reason for r in free} == {"stop", "length"}
    for r in free:
        assert (r.tokens[-1] == 1) == (r.finish_reason == "stop") and 1 not in r.tokens[:-1]
        assert len(r.tokens) == 60 or r.finish_reason == "stop"


def test_a_stop_string_ends_the_completion_and_stays_in_it(folder):
    (plain,) = generate(TorchEngine(folder), requests(1, 1, tokens=20))
    stop = plain.text[6:9]
    (stopped,) = generate(TorchEngine(folder), requests(1, 1, tokens=20, stop=("never seen", stop)))
    end = plain.text.index(stop) + 3
    assert stopped.text == plain.text[:end] and stopped.tokens == plain.tokens[:end]
    assert stopped.finish_reason == "stop"


def test_sleeping_frees_the_memory_and_waking_goes_on(folder):
    asked = requests(tokens=15)
    whole = generate(TorchEngine(folder), asked)
    engine = TorchEngine(folder)
    engine.submit(asked)
    for _ in range(5):
        engine._step()
    engine.sleep()
    assert sum(t.numel() for _, t in engine.decoder.weights()) == 0
    with pytest.raises(EngineUnusable, match="asleep"):
        engine.completed()
    engine.wake()
    again = {}
    while len(again) < len(asked):
        again.update((r.id, r) for r in engine.completed())
    assert [again[r.id].tokens for r in asked] == [r.tokens for r in whole]


def test_a_closed_engine_refuses(folder):
    engine = TorchEngine(folder)
    engine.close()
    with pytest.raises(EngineUnusable, match="closed"):
        engine.submit(requests())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(prompt_tokens=()), "empty prompt"),
        (dict(prompt_tokens=(3,) * 64), "has 64 tokens, the engine's context holds 64"),
        (dict(prompt_tokens=(3, VOCAB)), "ids outside"),
        (dict(sampling=Sampling(0)), "max_tokens >= 1"),
        (dict(sampling=Sampling(5, top_p=0.0)), "top_p in"),
    ],
)
def test_requests_that_cannot_be_served_are_named(folder, wrong, message):
    engine = TorchEngine(folder, max_context=64)
    good = dict(prompt_id="p7", sample=0, prompt_tokens=(3, 4), sampling=Sampling(5))
    with pytest.raises(ValueError, match="p7/0.*" + message):
        engine.submit([Request(**(good | wrong))])


def test_the_context_bounds_a_completion(folder):
    (r,) = generate(TorchEngine(folder, max_context=20), requests(1, 1, tokens=100))
    assert len(r.prompt_tokens) + len(r.tokens) == 20 and r.finish_reason == "length"


# sampling


@pytest.fixture(params=["torch", "native"])
def draw(request, folder):
    return sampler.draw if request.param == "torch" else TorchEngine(folder, kernels="native").decoder.draw


def test_drawn_frequencies_follow_the_distribution(folder, draw):
    logits = torch.full((VOCAB,), -30.0)
    logits[[3, 50, 7, 96, 0]] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 20_000
    keys = np.array([sampler.stream_key(0, f"p{i}", 0) for i in range(n)], np.uint64)
    noise = sampler.uniforms(keys, np.zeros(n, np.int64))
    tokens, logprobs = draw(logits.expand(n, -1), np.full(n, 0.7, np.float32), noise)
    expected = (logits.double() / 0.7).softmax(-1)
    assert np.abs(np.bincount(tokens, minlength=VOCAB) / n - expected.numpy()).max() < 0.015  # 4 deviations: 0.014
    assert np.abs(logprobs - expected.log().numpy()[tokens]).max() < 2e-6


def test_native_and_torch_draw_the_same(folder):
    torch.manual_seed(0)
    logits, noise = torch.randn(3000, VOCAB) * 3, np.random.default_rng(0).random(3000)
    temperature = np.linspace(0.3, 2.0, 3000, dtype=np.float32)
    native = TorchEngine(folder, kernels="native").decoder.draw(logits, temperature, noise)
    plain = sampler.draw(logits, temperature, noise)
    same = native[0] == plain[0]  # noise within rounding of a border falls on either side
    assert same.mean() > 0.999 and np.abs(native[1] - plain[1])[same].max() < 3e-6


def test_noise_is_uniform_over_positions_and_streams():
    keys = np.array([sampler.stream_key(7, "p", s) for s in range(64)], np.uint64)
    u = np.stack([sampler.uniforms(keys, np.full(64, t)) for t in range(512)])  # [positions, streams]
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert np.abs(np.corrcoef(u.T) - np.eye(64)).max() < 0.25


def brute_force(logits, top_p, top_k):
    """The kept set by the definition: most likely first, until top_k or until top_p is covered."""
    kept, mass = set(), 0.0
    probabilities = logits.double().softmax(-1)
    for token in sorted(range(len(logits)), key=lambda t: -float(logits[t])):
        if mass >= top_p or (top_k and len(kept) >= top_k):
            break
        kept.add(token)
        mass += float(probabilities[token])
    return kept


@pytest.mark.parametrize("top_p, top_k", [(0.5, 0), (1.0, 3), (0.9, 4), (0.01, 0), (1.0, 0)])
def test_top_p_and_top_k_keep_the_sets_of_their_definition(top_p, top_k):
    torch.manual_seed(0)
    logits = torch.randn(50, 12) * 2
    n = len(logits)
    kept = sampler.truncate(logits.log_softmax(-1), torch.full((n,), top_p), torch.full((n,), top_k)).isfinite()
    for row, allowed in zip(logits, kept, strict=True):
        assert set(allowed.nonzero()[:, 0].tolist()) == brute_force(row, top_p, top_k)


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(6, 9)
    settings = sampler.Settings.of([Sampling(1, temperature=0.0)] * 3 + [Sampling(1)] * 3)
    tokens, logprobs = sampler.sample(logits, settings, np.full(6, 0.999999))
    assert (tokens[:3] == logits.argmax(-1)[:3].numpy()).all() and (tokens[3:] == 8).all()
    assert np.abs(logprobs - logits.log_softmax(-1)[range(6), tokens].numpy()).max() < 1e-6


def test_truncation_draws_within_the_set_and_reports_the_whole_distribution():
    torch.manual_seed(0)
    logits = torch.randn(40, 12)
    settings = sampler.Settings.of([Sampling(1, temperature=0.5, top_p=0.8, top_k=3)] * 40)
    tokens, logprobs = sampler.sample(logits, settings, np.random.default_rng(0).random(40))
    for row, token, logprob in zip(logits / 0.5, tokens, logprobs, strict=True):
        assert token in brute_force(row, 0.8, 3)
        assert abs(float(row.double().log_softmax(-1)[token]) - logprob) < 1e-6


def test_broken_weights_are_an_error_not_a_token(folder):
    engine = TorchEngine(folder)
    engine.update(((name, tensor * float("nan")) for name, tensor in FolderReader(folder)), version=1)
    with pytest.raises(FloatingPointError, match="p0/0 are not finite"):
        generate(engine, requests(1, 1))
