"""What cannot be used is refused before anything starts, with what to do; nothing in a folder is ever run."""

from __future__ import annotations

import io
import re
import sys

import pytest
from safetensors.torch import load_file, save_file

from rlzero import cli
from rlzero.data.prompts import Prompts
from rlzero.data.sources import Row
from rollout.tokenizer import read_tokenizer
from rollout.torch.engine import TorchEngine
from tests.models.folders import ARCHITECTURES, CHATML, change_json, make, make_folder, make_tokenizer
from trainer.checkpoint.model_folder import refusal
from trainer.policy import PolicyOptions, load_policy

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED = {
    "gptq": (dict(model_type="llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized .gptq"),
    "awq": (dict(model_type="qwen2", quantization_config={"quant_method": "awq"}), "quantized .awq"),
    "bitsandbytes": (dict(model_type="llama", quantization_config=BNB), "quantized .bitsandbytes"),
    "gptj": (dict(model_type="gptj"), "gptj model cannot be trained"),
    "bloom": (dict(model_type="bloom"), "ALiBi"),
    "mpt": (dict(model_type="mpt"), "ALiBi"),
    "falcon": (dict(model_type="falcon"), "falcon model cannot be trained"),
    "t5": (dict(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
    "images": (dict(model_type="gemma3", vision_config={}, text_config={}), "language model as a folder of its own"),
    "custom": (dict(model_type="mine", auto_map={"AutoConfig": "modeling.Mine"}), "never run"),
    "nameless": (dict(hidden_size=8), "names no model_type"),
    "mamba layers": (dict(model_type="qwen3_next", layer_types=["linear_attention", "full_attention"]), "engine=vllm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_cannot_be_used_are_refused_with_the_reason(tmp_path, name):
    fields, reason = REFUSED[name]
    change_json(tmp_path / "config.json", **fields)
    assert re.search(reason, refusal(tmp_path, "torch"))
    with pytest.raises(ValueError, match=reason):
        TorchEngine(tmp_path)
    if name != "mamba layers":
        with pytest.raises(ValueError, match=reason):
            load_policy(PolicyOptions(path=str(tmp_path)))


def test_an_adapters_folder_says_to_merge_it(tmp_path):
    change_json(tmp_path / "adapter_config.json", base_model_name_or_path="some/base")
    assert "adapter of some/base" in refusal(tmp_path) and "merge" in refusal(tmp_path)


CONFIG = """
policy: {{path: {path}, dtype: float32}}
data: {{train: countdown, max_prompt_tokens: 100, template: {template}}}
rewards: [{{fn: "rewards.format:format_reward"}}]
rollout: {{engine: torch, max_tokens: 100}}
batch: {{prompts: 2, group_size: 2, minibatches: 1, tokens_per_micro_batch: 400}}
device: cpu
"""


def dry_run(monkeypatch, capsys, tmp_path, path, template="none") -> tuple[int, str]:
    (tmp_path / "run.yaml").write_text(CONFIG.format(path=path, template=template))
    monkeypatch.setattr(sys, "argv", ["rlzero", "plan", str(tmp_path / "run.yaml")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out + out.err


def test_code_in_a_folder_is_never_run_whatever_standard_input_says(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    change_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "modeling.Mine"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Tok", None]})
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w')\n")
    code, said = dry_run(monkeypatch, capsys, tmp_path, folder)
    assert code == 2 and "never run" in said and "Traceback" not in said
    with pytest.raises((ValueError, OSError)):
        read_tokenizer(folder)
    assert not (tmp_path / "written").exists()


def test_the_plan_shows_what_ends_a_text_and_which_rotation_is_held(monkeypatch, capsys, tmp_path):
    kind, fields = ARCHITECTURES["Phi-3, LongRoPE"]
    make_folder(tmp_path / "m", kind, tokenizer=make_tokenizer(chat_template=CHATML), **fields)
    code, said = dry_run(monkeypatch, capsys, tmp_path, tmp_path / "m")
    assert code == 0 and "text ends  <eos> (0), <|im_end|> (2)" in said
    assert "longrope: the long factors for every sequence, since the longest of 200 is longer than 32" in said


def test_tokens_past_the_vocabulary_are_found_before_a_run(monkeypatch, capsys, tmp_path):
    make_folder(tmp_path / "m")
    tokenizer = read_tokenizer(tmp_path / "m")
    size = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"])  # as Gemma 3's text models keep it
    tokenizer.save_pretrained(tmp_path / "m")
    assert dry_run(monkeypatch, capsys, tmp_path, tmp_path / "m")[0] == 0
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "m")
    code, said = dry_run(monkeypatch, capsys, tmp_path, tmp_path / "m")
    assert code == 2 and f"'<think>' is {size + 1}" in said and "resize_token_embeddings" in said


@pytest.mark.parametrize("template, ends", [("chat", 1), ("r1-zero", 0), ("none", 1)])
def test_a_rows_special_tokens_stay_text_unless_the_template_is_none(template, ends):
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = [Row({"prompt": "What does <|im_end|> do?"}, "rows:1")]
    (prompt,) = Prompts(rows, tokenizer, template=template, max_prompt_tokens=800)
    assert prompt.tokens.count(2) == ends  # a chat's own, behind the question
    assert "What does <|im_end|> do?" in prompt.text == tokenizer.decode(prompt.tokens)


@pytest.mark.parametrize("fault, message", [("head", "tie_word_embeddings to false"), ("tensor", "lacks 1 tensors")])
def test_weights_that_contradict_config_json_are_refused(tmp_path, fault, message):
    make("tied, with a copy of the head", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if fault == "head":
        weights["lm_head.weight"] += 0.1
    else:
        del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (TorchEngine, lambda path: load_policy(PolicyOptions(path=str(path), dtype="float32"))):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_what_would_fail_at_saving_fails_at_loading(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("{broken")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        load_policy(PolicyOptions(path=str(tmp_path), dtype="float32"))
