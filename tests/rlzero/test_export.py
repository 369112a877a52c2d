"""`rlzero export`: formats, and what cannot be had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlzero.cli import main
from tests.trainer.test_model_parity import TINY, packed, random_model, relative
from trainer.checkpoint import hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf.save_folder(random_model(dataclasses.replace(TINY, num_nextn_predict_layers=1)).to(torch.bfloat16), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def export(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["rlzero", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, capsys.readouterr().err


def test_fp8_is_exported_and_back_with_the_other_files(folder, monkeypatch, capsys, tmp_path):
    code, err = export(monkeypatch, capsys, folder, tmp_path / "fp8", "--format", "fp8")
    assert code == 0, err
    code, err = export(monkeypatch, capsys, tmp_path / "fp8", tmp_path / "bf16", "--format", "bf16")
    assert code == 0, err
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    for name, quantized in (("fp8", True), ("bf16", False)):
        target = tmp_path / name
        assert {file.name for file in target.iterdir()} == names
        assert ("quantization_config" in json.loads((target / "config.json").read_text())) is quantized
        types = {t.dtype for t in load_file(target / "model.safetensors").values()}
        assert (torch.float8_e4m3fn in types) is quantized
    logits = []
    tokens, positions, bounds = packed([12], TINY.vocab_size)
    for name in ("fp8", "bf16"):
        model = hf.load_folder(tmp_path / name, torch.bfloat16)
        with torch.no_grad():
            logits.append(model.logits(model(tokens, positions, bounds).hidden))
    assert torch.equal(*logits)


def test_bf16_of_an_fp8_run_by_dtype_is_scaled(folder, monkeypatch, capsys, tmp_path):
    """FP8 codes cast without their scales would be off by orders of magnitude."""
    assert export(monkeypatch, capsys, folder, tmp_path / "fp8", "--format", "fp8")[0] == 0
    assert export(monkeypatch, capsys, tmp_path / "fp8", tmp_path / "fp32", "--dtype", "float32")[0] == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "fp32"))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert after[name].dtype == torch.float32 and relative(after[name], before[name].float()) <= 2.0**-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "int4"], "--format int4: expected bf16 or fp8"),
        (["--format", "fp8", "--dtype", "float32"], "not beside --dtype"),
    ],
)
def test_wrong_formats_are_named(folder, monkeypatch, capsys, tmp_path, options, message):
    code, err = export(monkeypatch, capsys, folder, tmp_path / "out", *options)
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_fp8_of_another_architecture_is_refused_and_bf16_keeps_its_integers(monkeypatch, capsys, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {"a.weight": torch.randn(4, 4), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    code, err = export(monkeypatch, capsys, tmp_path / "llama", tmp_path / "out", "--format", "fp8")
    assert code == 2 and "model_type deepseek_v3 only, found llama" in err and not (tmp_path / "out").exists()
    assert export(monkeypatch, capsys, tmp_path / "llama", tmp_path / "out", "--format", "bf16")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a.weight"], tensors["a.weight"].bfloat16()) and torch.equal(found["ids"], tensors["ids"])
