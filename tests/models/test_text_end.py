"""What ends a text is one rule, and the text that rewards get is all but the token that ended it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rollout.engine import Request, Sampling, generate
from rollout.torch.engine import TorchEngine
from tests.models.folders import CHATML, SPECIAL, change_json, make_folder, make_tokenizer
from trainer.checkpoint.model_folder import generation_fields, text_end, turn_end
from trainer.packing import Sample, pack
from trainer.policy import PolicyOptions, load_policy

EOS, START, END = 0, 1, 2


def test_all_sources_are_asked_and_their_differences_named(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHATML)
    make_folder(tmp_path, tokenizer=tokenizer)
    change_json(tmp_path / "generation_config.json", eos_token_id=[5, EOS])
    end = text_end(tmp_path, tokenizer, learned=[START])
    assert end.ids == (EOS, START, END, 5) and end.differ
    assert "the chat template: <|im_end|> (2)" in end.describe(tokenizer)
    (tmp_path / "generation_config.json").unlink()
    plain = make_tokenizer()
    assert text_end(tmp_path, plain).ids == (EOS,) and not text_end(tmp_path, plain).differ


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, END),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_chat_template_says_what_ends_a_turn(template, expected):
    assert turn_end(make_tokenizer(chat_template=template)) == expected


def test_the_torch_engine_stops_at_each_of_them_and_keeps_other_special_tokens(tmp_path):
    """Qwen's base: its generation_config knows <eos> alone, its chat template ends turns with <|im_end|>."""
    special = ["<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = make_tokenizer(special, chat_template=CHATML)
    make_folder(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer), initializer_range=0.02)
    engine = TorchEngine(tmp_path)
    assert engine.end_tokens == (EOS, END)
    prompts = [tuple(np.random.default_rng(i).integers(5, 200, 6).tolist()) for i in range(40)]
    asked = [Request(f"p{i}", 0, prompt, Sampling(120, seed=3)) for i, prompt in enumerate(prompts)]
    rollouts = generate(engine, asked)
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert {r.tokens[-1] for r in stopped} == {EOS, END} and len({len(r.tokens) for r in stopped}) > 3
    assert all(not {EOS, END} & set(r.tokens[:-1]) for r in rollouts)
    for r in rollouts:
        kept = r.tokens[:-1] if r.finish_reason == "stop" else r.tokens
        assert r.text == tokenizer.decode(kept, skip_special_tokens=False)
    assert any("<think>" in r.text or "</think>" in r.text for r in rollouts)
    # The log-probabilities hold whoever ended before.
    policy = load_policy(PolicyOptions(path=str(tmp_path), dtype="float32"))
    for r in rollouts[:8]:
        (batch,) = pack([Sample(r.prompt_tokens, r.tokens)], 512)
        found = policy.logprobs(batch)[0][len(r.prompt_tokens) :].detach().numpy()
        assert np.abs(found - np.array(r.logprobs)).max() < 1e-5


def test_a_stop_string_may_be_a_special_token_and_stays_in_the_text(tmp_path):
    special = ["<eos>", "</answer>"]
    tokenizer = make_tokenizer(special)
    make_folder(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer), initializer_range=0.02)
    asked = [Request(f"p{i}", 0, (9, 8, 7 + i), Sampling(300, seed=1, stop=("</answer>",))) for i in range(12)]
    rollouts = generate(TorchEngine(tmp_path), asked)
    answered = [r for r in rollouts if r.tokens[-1] == 1]
    assert answered and all(r.text.endswith("</answer>") and r.finish_reason == "stop" for r in answered)


def test_a_checkpoint_names_what_ends_a_text_and_is_repaired(tmp_path):
    """Llama-2-chat's generation_config: greedy, with flags that only sampling reads."""
    make_folder(tmp_path / "base")
    change_json(tmp_path / "base" / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)
    options = PolicyOptions(path=str(tmp_path / "base"), dtype="float32", end_tokens=(EOS, END))
    load_policy(options).save(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [EOS, END] and found["do_sample"] is False
    assert not {"temperature", "top_p"} & found.keys()
    from transformers import GenerationConfig

    GenerationConfig.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")  # validates strictly
    assert TorchEngine(tmp_path / "saved").end_tokens == (EOS, END)


def test_flags_of_sampling_stay_where_it_samples(tmp_path):
    change_json(tmp_path / "generation_config.json", do_sample=True, temperature=0.9, top_p=0.6, eos_token_id=7)
    assert generation_fields(tmp_path, (7,)) == {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}


def test_vllm_ends_at_the_same_tokens_with_the_same_text(tmp_path, vllm_process):
    tokenizer = make_tokenizer([*SPECIAL, "<think>"], chat_template=CHATML)
    make_folder(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer), initializer_range=0.02)
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20}
    engine = vllm_process.VLLMEngine(tmp_path, dtype="float32", max_context=200, max_batch=8, engine_args=arguments)
    try:
        asked = [Request(f"p{i}", 0, (9, 8, 7 + i), Sampling(150, seed=3)) for i in range(24)]
        rollouts = generate(engine, asked)
    finally:
        engine.close()
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert {r.tokens[-1] for r in stopped} == {EOS, END} and any("<think>" in r.text for r in rollouts)
    for r in rollouts:
        kept = r.tokens[:-1] if r.finish_reason == "stop" else r.tokens
        assert r.text == tokenizer.decode(kept, skip_special_tokens=False) and not {EOS, END} & set(kept)
