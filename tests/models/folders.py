"""Folders of random two-layer models, one for each architecture and form of docs/models.md."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=None, initializer_range=0.1,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32)
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16)
LATENT = dict(
    kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
    topk_group=1, num_key_value_heads=2, topk_method="greedy",
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0] * 16, long_factor=[1.0 + i / 2 for i in range(16)], rope_theta=1e4,
    original_max_position_embeddings=32,
)  # fmt: skip
# name: (model type, fields of its config.json)
ARCHITECTURES = {
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", dict(head_dim=32)),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Llama": ("llama", {}),
    "Llama, dynamic NTK": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))),
    "Mistral": ("mistral", dict(sliding_window=None, head_dim=32)),
    "Mistral, sliding window": ("mistral", dict(sliding_window=16, head_dim=32)),
    "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3": ("gemma3_text", dict(GEMMA, layer_types=["sliding_attention", "full_attention"])),
    "Phi-3": ("phi3", {}),
    "Phi-3, LongRoPE": ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=32)),
    "GLM4": ("glm4", dict(head_dim=32)),
    "OLMo2": ("olmo2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", dict(n_embd=64, n_layer=2, n_head=2, n_positions=512)),
    "Granite": ("granite", dict(logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0)),
    "Cohere": ("cohere", dict(logit_scale=0.25)),
    "SmolLM3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "DeepSeek-V2": ("deepseek_v2", LATENT),
}  # fmt: skip


def make_tokenizer(special: list[str] = SPECIAL, **options) -> PreTrainedTokenizerFast:
    """Bytes as tokens, behind the special ones; `<eos>` is 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **options)


def make_folder(folder: Path, kind="qwen2", seed=0, tokenizer=None, dtype=torch.float32, **fields) -> Path:
    """A folder with a random model of type `kind` and a tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.save_pretrained(folder)
    given = {"vocab_size": len(tokenizer), **SMALL, **fields}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:  # norms and biases that are 1 and 0 hide what forgets them
                tensor.add_(0.1 * torch.randn(tensor.shape))
    model.to(dtype).save_pretrained(folder)
    return Path(folder)


def change_json(file: Path, **fields) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **fields}))


# ---- forms in which people bring a model ----


def _tied(folder: Path) -> None:
    make_folder(folder, tie_word_embeddings=True)


def _tied_with_head(folder: Path) -> None:
    """As a merged adapter or DeepSpeed leave it: the embedding once more, as lm_head.weight."""
    make_folder(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _sharded(folder: Path) -> None:
    make_folder(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (folder / "model.safetensors.index.json").exists()


def _bin(folder: Path) -> None:
    make_folder(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _several_ends(folder: Path) -> None:
    make_folder(folder, eos_token_id=[0, 2])


def _added(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    make_folder(folder, tokenizer=tokenizer)


FORMS = {
    "tied": _tied,
    "tied, with a copy of the head": _tied_with_head,
    "sharded": _sharded,
    ".bin only": _bin,
    "FP16": lambda folder: make_folder(folder, dtype=torch.float16),
    "several EOS ids": _several_ends,
    "padded vocabulary": lambda folder: make_folder(folder, vocab_size=320),
    "added tokens": _added,
}


def make(name: str, folder: Path) -> Path:
    """The folder of a row of docs/models.md."""
    if name in FORMS:
        FORMS[name](folder)
    else:
        kind, fields = ARCHITECTURES[name]
        make_folder(folder, kind, **fields)
    return folder
