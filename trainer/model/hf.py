"""Weights in and out: DeepSeek's checkpoint names, Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.model.config import V3Config
from trainer.model.layers import SwiGLU
from trainer.model.moe import MoE
from trainer.model.v3 import Block, V3Model
from trainer.precision.quantize import FLOAT8, Quantized
from trainer.precision.recipe import Recipe

SHARD_BYTES = 4 * 1024**3


def named_checkpoint_tensors(model: V3Model, mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(DeepSeek's checkpoint name, view of the model's own storage) in the order of the layers.

    MTP depth d is layer num_hidden_layers + d - 1, with the shared embedding and head repeated as DeepSeek's
    checkpoints do; `mtp=False` leaves these layers out (an engine without speculative decoding has no place for
    them)."""
    layers = model.config.num_hidden_layers
    yield "model.embed_tokens.weight", model.embed.detach()
    for i, block in enumerate(model.layers):
        yield from _block_tensors(f"model.layers.{i}", block)
    for i, layer in enumerate(model.mtp_layers if mtp else (), start=layers):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.embed_tokens.weight", model.embed.detach()
        yield f"{prefix}.enorm.weight", layer.enorm.weight.detach()
        yield f"{prefix}.hnorm.weight", layer.hnorm.weight.detach()
        yield f"{prefix}.eh_proj.weight", layer.eh_proj.weight.detach()
        yield from _block_tensors(prefix, layer.block)
        yield f"{prefix}.shared_head.norm.weight", layer.norm.weight.detach()
        yield f"{prefix}.shared_head.head.weight", (model.embed if model.head is None else model.head).detach()
    yield "model.norm.weight", model.norm.weight.detach()
    # Of a tied model too: vLLM's DeepSeek classes know no tied head and would leave theirs unloaded.
    yield "lm_head.weight", (model.embed if model.head is None else model.head).detach()


_ATTENTION = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}


def _block_tensors(prefix: str, block: Block) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.input_layernorm.weight", block.attn_norm.weight.detach()
    for name, child in block.attn.named_children():
        yield f"{prefix}.self_attn.{_ATTENTION[name]}.weight", child.weight.detach()
    yield f"{prefix}.post_attention_layernorm.weight", block.ffn_norm.weight.detach()
    ffn = block.ffn
    if isinstance(ffn, SwiGLU):
        yield from _swiglu_tensors(f"{prefix}.mlp", ffn.w13.weight, ffn.w2.weight)
        return
    assert isinstance(ffn, MoE)
    yield f"{prefix}.mlp.gate.weight", ffn.router.weight.detach()
    yield f"{prefix}.mlp.gate.e_score_correction_bias", ffn.router.bias
    for e, (w13, w2) in enumerate(zip(ffn.experts.w13, ffn.experts.w2, strict=True)):
        yield from _swiglu_tensors(f"{prefix}.mlp.experts.{e}", w13, w2)
    if ffn.shared is not None:
        yield from _swiglu_tensors(f"{prefix}.mlp.shared_experts", ffn.shared.w13.weight, ffn.shared.w2.weight)


def _swiglu_tensors(prefix: str, w13: Tensor, w2: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = w13.detach().chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", w2.detach()


@torch.no_grad()
def load_checkpoint_tensors(model: V3Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fills the model; values are cast to the model's dtype. Raises ValueError that lists every missing, unexpected
    and wrongly shaped tensor, and MTP copies of embedding or head that are not the main model's (this model shares
    them). Such copies and, in a tied model, `lm_head.weight` may be absent."""
    places = dict(named_checkpoint_tensors(model))
    shared = {name for name in places if name.endswith(".shared_head.head.weight") or ".embed_tokens." in name}
    shared.discard("model.embed_tokens.weight")
    if model.head is None:
        shared.add("lm_head.weight")
    copies: dict[str, Tensor] = {}
    missing, wrong = set(places) - shared, []
    for name, tensor in tensors:
        place = places.get(name)
        if place is None:
            wrong.append(f"unexpected: {name} {list(tensor.shape)}")
        elif place.shape != tensor.shape:
            wrong.append(f"shape: {name} is {list(tensor.shape)}, the model has {list(place.shape)}")
        elif name in shared:
            copies[name] = tensor
        else:
            place.copy_(tensor)
        missing.discard(name)
    wrong += [f"missing: {name}" for name in sorted(missing)]
    for name, tensor in copies.items():
        if not torch.equal(places[name], tensor.to(places[name])):
            wrong.append(f"differs: {name} is not the main model's, and this model shares them")
    if wrong:
        raise ValueError(f"the checkpoint does not fit the model ({len(wrong)} mistakes):\n  " + "\n  ".join(wrong))


def save_folder(model: V3Model, folder: str | Path, tokenizer: Any = None) -> None:
    """Writes config.json and safetensors (several files above 4 GiB), and the tokenizer when given, as a folder that
    transformers and vLLM load. Not atomic: trainer.checkpoint writes into a folder it renames."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.embed.dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor in named_checkpoint_tensors(model):
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
        total += tensor.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    tensors = named_checkpoint_tensors(model)
    for file, names in zip(files, shards, strict=True):
        # clone: safetensors refuses views of one storage (an expert of the stack, a copy of the embedding)
        shard = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in _take(tensors, len(names))}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _take(tensors: Iterator[tuple[str, Tensor]], count: int) -> Iterator[tuple[str, Tensor]]:
    for _ in range(count):
        yield next(tensors)


def load_folder(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    recipe: Recipe = "bf16",
    activation_checkpointing: bool = False,
) -> V3Model:
    """The model of a Hugging Face folder, in `dtype` (None: that of the file's embedding). DeepSeek's FP8 weights are
    dequantized. Errors: FileNotFoundError; ValueError as `V3Config.load` and `load_checkpoint_tensors` raise."""
    config = V3Config.load(folder)
    with torch.device("meta"):
        model = V3Model(config, recipe, activation_checkpointing)
    reader = FolderReader(folder)
    model = model.to(dtype or reader.dtype("model.embed_tokens.weight")).to_empty(device=device)
    load_checkpoint_tensors(model, iter(reader))
    return model


class FolderReader:
    """The tensors of a folder's safetensors, one at a time, FP8 ones dequantized to float32 by their scales."""

    def __init__(self, folder: str | Path) -> None:
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise FileNotFoundError(f"{folder} holds no *.safetensors: expected the weights of a Hugging Face folder")
        self.open = [safe_open(file, framework="pt") for file in self.files]
        self.where = {name: handle for handle in self.open for name in handle.keys()}  # noqa: SIM118

    def dtype(self, name: str) -> torch.dtype:
        if name not in self.where:
            raise ValueError(f"{self.files[0].parent} holds no tensor {name}: expected DeepSeek-V3 weights")
        return self.where[name].get_tensor(name).dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, handle in self.where.items():
            if name.endswith("_scale_inv"):
                continue
            tensor = handle.get_tensor(name)
            if tensor.dtype == FLOAT8:  # DeepSeek's released weights
                scale_name = f"{name}_scale_inv"
                if scale_name not in self.where:
                    raise ValueError(f"{name} is FP8 without {scale_name}: expected one scale per 128x128 block")
                tensor = Quantized(tensor, self.where[scale_name].get_tensor(scale_name)).dequantize()
            yield name, tensor
