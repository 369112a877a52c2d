"""Configurations and checkpoints: what is accepted, and what the errors say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.trainer.test_model_parity import CONFIGS, TINY, packed, random_model, relative
from trainer.checkpoint import hf
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config
from trainer.precision.quantize import quantize_blocks


def test_all_violations_stand_in_one_error():
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, qk_rope_head_dim=7, n_group=3, hidden_size=0, rope_scaling={"type": "linear"})
    message = str(error.value)
    for part in ("hidden_size is 0", "qk_rope_head_dim is 7", "8 do not divide into n_group 3", "type 'linear'"):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "found model_type 'llama', expected 'deepseek_v3'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', this model computes 'sigmoid' only"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_another_architecture_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        V3Config.from_hf({**TINY.to_hf(), **change})


def test_a_missing_field_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder"):
        V3Config.load(tmp_path)
    incomplete = {k: v for k, v in TINY.to_hf().items() if k not in ("kv_lora_rank", "hidden_size", "vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match=r"hidden_size is missing(?s:.*)|vocab_size is missing"):
        V3Config.load(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        hf.load_folder(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path):
    model = random_model(TINY)
    hf.save_folder(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["model.layers.9.odd"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="3 mistakes") as error:
        hf.load_folder(tmp_path)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.experts.3.up_proj.weight" in message
    assert "shape: model.norm.weight is [3], the model has [48]" in message
    assert "unexpected: model.layers.9.odd [1]" in message


def test_an_mtp_layer_with_an_embedding_of_its_own_is_an_error():
    config = dataclasses.replace(TINY, num_nextn_predict_layers=1)
    model = random_model(config)
    tensors = {name: t.clone() for name, t in hf.named_checkpoint_tensors(model)}
    tensors["model.layers.3.embed_tokens.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="differs: model.layers.3.embed_tokens.weight"):
        hf.load_checkpoint_tensors(V3Model(config), tensors.items())
    del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]
    hf.load_checkpoint_tensors(V3Model(config), tensors.items())  # checkpoints without the copies are fine


def test_names_without_mtp_are_those_of_the_main_model():
    model = random_model(dataclasses.replace(TINY, num_nextn_predict_layers=1))
    main = [name for name, _ in hf.named_checkpoint_tensors(model, mtp=False)]
    assert main == [name for name, _ in hf.named_checkpoint_tensors(model) if not name.startswith("model.layers.3.")]
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in main
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in main


def test_a_tied_head_is_written_and_may_be_absent(tmp_path):
    """Written for engines that know no tied heads; transformers leaves it out."""
    model = random_model(CONFIGS["tied_head"])
    tensors = dict(hf.named_checkpoint_tensors(model))
    assert torch.equal(tensors["lm_head.weight"], model.embed)
    del tensors["lm_head.weight"]
    loaded = V3Model(CONFIGS["tied_head"])
    hf.load_checkpoint_tensors(loaded, tensors.items())
    assert torch.equal(loaded.embed, model.embed)
    with pytest.raises(ValueError, match="differs: lm_head.weight"):
        hf.load_checkpoint_tensors(loaded, [*tensors.items(), ("lm_head.weight", model.embed + 1)])


def test_checkpoint_tensors_share_the_models_memory():
    """An engine in the same process may read them without a copy; loading writes through them."""
    model = random_model(TINY)
    tensors = dict(hf.named_checkpoint_tensors(model))
    model.layers[1].ffn.experts.w13.data[2, 0, 0] = 7.0
    assert tensors["model.layers.1.mlp.experts.2.gate_proj.weight"][0, 0] == 7.0
    sizes = sum(t.numel() for t in tensors.values())
    assert sizes == sum(p.numel() for p in model.parameters()) + sum(r.bias.numel() for r in model.routers())


def test_deepseeks_fp8_weights_are_dequantized(tmp_path):
    """A folder in the form of DeepSeek's release: E4M3 weights beside `weight_scale_inv`."""
    config = dataclasses.replace(TINY, hidden_size=160, kv_lora_rank=130)
    model = random_model(config)
    hf.save_folder(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        quantized = quantize_blocks(tensors[name])
        tensors[name], tensors[f"{name}_scale_inv"] = quantized.values, quantized.scales
        expected[name] = quantized.dequantize()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = dict(hf.named_checkpoint_tensors(hf.load_folder(tmp_path, torch.float32)))
    assert len(expected) > 60
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_the_full_deepseek_v3_has_its_671_billion_parameters():
    """The published configuration on the meta device: 671 B in the main model (report, section 4.2)."""
    config = V3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, kv_lora_rank=512,
        q_lora_rank=1536, first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        max_position_embeddings=163840, num_nextn_predict_layers=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = V3Model(config)
    mtp = model.mtp_layers[0]
    main = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in mtp.parameters())
    assert main / 1e9 == pytest.approx(671.0, abs=0.05)
    # README_WEIGHTS.md: 11.5 B unique parameters of the MTP module; that is its block, without the 0.1 B of eh_proj
    assert sum(p.numel() for p in mtp.block.parameters()) / 1e9 == pytest.approx(11.5, abs=0.05)


def test_weights_depend_on_the_seed_alone():
    models = [V3Model(TINY).init_weights(seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(models[0][n], models[1][n]) for n in models[0])
    assert not torch.equal(models[0]["embed"], models[2]["embed"])
    assert float(models[0]["layers.1.ffn.experts.w13"].std()) == pytest.approx(TINY.initializer_range, rel=0.05)


def test_a_bfloat16_folder_gives_transformers_logits(tmp_path):
    """BF16 weights, MTP in the file, both computed in float32: exact weights, so float32 agreement."""
    model = random_model(dataclasses.replace(CONFIGS["groups"], num_nextn_predict_layers=1)).to(torch.bfloat16)
    hf.save_folder(model, tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    own = hf.load_folder(tmp_path, torch.float32)
    tokens, positions, bounds = packed([12], TINY.vocab_size)
    with torch.no_grad():
        logits = own.logits(own(tokens, positions, bounds).hidden)
        assert relative(logits, twin(tokens[None]).logits[0]) <= 1e-5


def test_a_bfloat16_model_computes_near_its_float32_twin():
    """Same BF16 weights: mean |Δ log p| per token below 0.02, with the float32 routing replayed (a near tie may turn
    over otherwise)."""
    model = random_model(CONFIGS["q_lora"]).to(torch.bfloat16)
    exact = random_model(CONFIGS["q_lora"])
    exact.load_state_dict(model.state_dict())
    batch = packed([12, 5, 30], TINY.vocab_size)
    with torch.no_grad():
        reference = exact(*batch)
        expected = exact.logits(reference.hidden).log_softmax(-1)
        found = model.logits(model(*batch, routed_experts=reference.experts).hidden).float().log_softmax(-1)
    assert float((found - expected).gather(1, expected.argmax(-1, keepdim=True)).abs().mean()) <= 0.02
