"""The native V3 model against transformers.DeepseekV3ForCausalLM, float32, and what it promises beyond it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from trainer.checkpoint import hf
from trainer.model.v3 import V3Model
from trainer.model.v3_config import V3Config

TINY = V3Config(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=8,
    num_experts_per_tok=3,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=64,
    initializer_range=0.1,
)
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS = {
    "plain": TINY,
    "q_lora": dataclasses.replace(TINY, q_lora_rank=20),
    "groups": dataclasses.replace(TINY, n_group=4, topk_group=2),
    "yarn": dataclasses.replace(TINY, rope_scaling=YARN),
    "yarn_unequal_mscale": dataclasses.replace(TINY, rope_scaling={**YARN, "mscale": 0.7}, q_lora_rank=20),
    "tied_head": dataclasses.replace(TINY, tie_word_embeddings=True),
    "half_rope": dataclasses.replace(TINY, rope_interleave=False),
    "no_renormalization": dataclasses.replace(TINY, norm_topk_prob=False),
    "two_shared": dataclasses.replace(TINY, first_k_dense_replace=0, n_shared_experts=2, n_group=2, topk_group=1),
    "all_dense": dataclasses.replace(TINY, first_k_dense_replace=3),
}  # fmt: skip
LENGTHS = [7, 12, 1, 12, 3]


def random_model(config: V3Config, seed: int = 0, **options) -> V3Model:
    """Random weights, norms and router biases: nothing is left at a value that hides a mistake."""
    model = V3Model(config, **options).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
        for router in model.routers():
            router.bias.normal_(0.0, 0.3, generator=generator)
    return model


def packed(lengths: list[int], vocab: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0)


def transformers_twin(model: V3Model) -> DeepseekV3ForCausalLM:
    """transformers' model with the same weights, through our checkpoint names and its fused ones."""
    config = DeepseekV3Config(**model.config.to_hf(), attn_implementation="eager", experts_implementation="eager")
    twin = DeepseekV3ForCausalLM(config)
    own = fused_names(dict(hf.named_checkpoint_tensors(model, mtp=False)), model.config)
    result = twin.load_state_dict(own, strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    return twin.eval()


def fused_names(tensors: dict[str, torch.Tensor], config: V3Config) -> dict[str, torch.Tensor]:
    """DeepSeek's names to transformers 5's, which stack the experts."""
    fused = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors if ".mlp.experts." in name}:
        expert = [
            {p: tensors[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
            for e in range(config.n_routed_experts)
        ]
        fused[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in expert])
        fused[f"{layer}.experts.down_proj"] = torch.stack([e["down"] for e in expert])
    return fused


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_parity(model: V3Model, twin, lengths: list[int]) -> None:
    """Logits and all gradients are those of transformers' model, to 1e-5 of the largest value."""
    tokens, positions, bounds = packed(lengths, TINY.vocab_size)
    weight = torch.randn(len(tokens), TINY.vocab_size, generator=torch.Generator().manual_seed(9))
    logits = model.logits(model(tokens, positions, bounds).hidden)
    (logits * weight).sum().backward()
    expected = torch.cat([twin(d[None], use_cache=False).logits[0] for d in tokens.split(lengths)])
    (expected * weight).sum().backward()
    assert relative(logits, expected) <= 1e-5
    gradients = V3Model(model.config)
    gradients.load_state_dict({n: p.grad for n, p in model.named_parameters()}, strict=False)
    own = fused_names(dict(hf.named_checkpoint_tensors(gradients, mtp=False)), model.config)
    for parameter_name, parameter in twin.named_parameters():
        assert relative(own[parameter_name], parameter.grad) <= 1e-5, parameter_name


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(name):
    model = random_model(CONFIGS[name])
    assert_parity(model, transformers_twin(model), LENGTHS)


@pytest.mark.parametrize("name", ["plain", "q_lora", "yarn", "tied_head", "all_dense"])
def test_saved_folder_loads_in_transformers_with_equal_logits(name, tmp_path):
    model = random_model(dataclasses.replace(CONFIGS[name], num_nextn_predict_layers=1))
    hf.save_folder(model, tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, positions, bounds = packed([9], TINY.vocab_size)
    with torch.no_grad():
        logits = model.logits(model(tokens, positions, bounds).hidden)
        assert relative(logits, twin(tokens[None]).logits[0]) <= 1e-5


def test_a_folder_written_by_transformers_loads(tmp_path):
    config = DeepseekV3Config(**{**CONFIGS["yarn"].to_hf(), "num_nextn_predict_layers": 0})
    torch.manual_seed(0)
    twin = DeepseekV3ForCausalLM(config).eval()
    twin.save_pretrained(tmp_path)
    model = hf.load_folder(tmp_path)
    tokens, positions, bounds = packed([9], TINY.vocab_size)
    with torch.no_grad():
        logits = model.logits(model(tokens, positions, bounds).hidden)
        assert relative(logits, twin(tokens[None]).logits[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_round_trip_is_bit_exact_mtp_included(dtype, tmp_path):
    config = dataclasses.replace(CONFIGS["q_lora"], num_nextn_predict_layers=2)
    model = random_model(config).to(dtype)
    hf.save_folder(model, tmp_path)
    loaded = hf.load_folder(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_folder_in_several_files_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    model = random_model(TINY)
    hf.save_folder(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = hf.load_folder(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    AutoModelForCausalLM.from_pretrained(tmp_path)  # the index is one that transformers reads


def test_mtp_predictions_are_those_of_transformers():
    config = dataclasses.replace(CONFIGS["groups"], num_nextn_predict_layers=2, first_k_dense_replace=1)
    model = random_model(config)
    twin = transformers_twin(model)
    reference = MtpModel(twin, 2).eval()
    tensors = dict(hf.named_checkpoint_tensors(model))
    fused = fused_names(tensors, config)
    state = {}
    for d in range(2):
        prefix = f"model.layers.{config.num_hidden_layers + d}."
        for name, tensor in fused.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                rest = rest if rest.split(".")[0] in ("enorm", "hnorm", "eh_proj") else f"mtp_block.{rest}"
                rest = rest.replace("mtp_block.shared_head.norm", "post_norm")
                state[f"layers.{d}.{rest}"] = tensor
    state = {n: t for n, t in state.items() if "embed_tokens" not in n and "shared_head" not in n}
    result = reference.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(n.startswith(("embed_tokens", "shared_head")) for n in result.missing_keys)

    lengths = [9, 14]
    tokens, positions, bounds = packed(lengths, config.vocab_size)
    with torch.no_grad():
        outputs = model.mtp(model(tokens, positions, bounds).hidden, tokens, positions, bounds)
        for start, length in zip(bounds.tolist(), lengths, strict=False):
            document = tokens[start : start + length]
            hidden = twin.model(document[None]).last_hidden_state
            for depth, layer in enumerate(reference.layers, start=1):
                kept = length - depth
                place = torch.arange(kept)[None]
                causal = torch.full((1, 1, kept, kept), float("-inf")).triu(1)
                hidden = layer(
                    twin.model.embed_tokens(document[depth:])[None],
                    hidden[:, :kept],
                    position_embeddings=twin.model.rotary_emb(hidden, place),
                    attention_mask=causal,
                    position_ids=place,
                    past_key_values=None,
                )
                own = model.logits(outputs[depth - 1].hidden[start : start + kept])
                assert relative(own, twin.lm_head(hidden[0])) <= 1e-5
