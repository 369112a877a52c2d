"""Weights in and out: DeepSeek's checkpoint names, Hugging Face folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.checkpoint.folder import SCALE, Entry, FolderReader, FolderWriter, refuse
from trainer.checkpoint.model_folder import read_config
from trainer.model.layers import SwiGLU
from trainer.model.moe import MoE
from trainer.model.v3 import Block, V3Model
from trainer.model.v3_config import FP8_BLOCKS, V3Config
from trainer.precision.quantize import FLOAT8, Quantized, block_scales_shape, quantize_blocks
from trainer.precision.recipe import Recipe

SHARD_BYTES = 4 * 1024**3
Format = Literal["fp32", "bf16", "fp8"]
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # fp8: of what is not quantized

# What DeepSeek's FP8 release quantizes: every Linear of attention, MLP and experts. Embedding, head, router, norms and
# MTP's eh_proj stay BF16, the router's bias float32.
_QUANTIZED = re.compile(
    r"\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.((shared_experts|experts\.\d+)\.)?(gate|up|down)_proj)\.weight$"
)


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
    copies = _copies(model, places)
    early: dict[str, Tensor] = {}  # copies that came before what they are copies of
    missing, wrong = set(places) - set(copies), []

    def compare(name: str, tensor: Tensor) -> None:
        if not torch.equal(places[name], tensor.to(places[name])):
            wrong.append(f"differs: {name} is not the main model's, and this model shares them")

    for name, tensor in tensors:
        if mistake := _misfit(places, name, tensor.shape):
            wrong.append(mistake)
        elif name not in copies:
            places[name].copy_(tensor)
        elif copies[name] in missing:
            early[name] = tensor
        else:
            compare(name, tensor)
        missing.discard(name)
    for name, tensor in early.items():
        compare(name, tensor)
    wrong += [f"missing: {name}" for name in sorted(missing)]
    if wrong:
        refuse("the checkpoint does not fit the model", wrong)


def load_weights(model: V3Model, folder: str | Path) -> None:
    """Fills the model from a Hugging Face folder, one tensor at a time; DeepSeek's FP8 weights are dequantized.

    All that the files' headers can tell is checked before the first weight changes: ValueError lists missing and
    damaged files, missing scales, and what `load_checkpoint_tensors` lists. Errors: FileNotFoundError."""
    reader = FolderReader(folder)
    places = dict(named_checkpoint_tensors(model))
    missing = set(places) - set(_copies(model, places)) - set(reader.entries) - reader.lost
    weights = [entry for name, entry in reader.entries.items() if not name.endswith(SCALE)]
    wrong = [mistake for entry in weights if (mistake := _misfit(places, entry.name, entry.shape))]
    wrong += [f"dtype: {e.name} is {e.dtype}, expected a float" for e in weights if not e.dtype.is_floating_point]
    wrong = [*reader.problems, *wrong, *(f"missing: {name}" for name in sorted(missing))]
    if wrong:
        refuse(f"{folder} does not fit the model", wrong)
    load_checkpoint_tensors(model, iter(reader))


def _copies(model: V3Model, places: Iterable[str]) -> dict[str, str]:
    """Names under which a folder may repeat an embedding or a head, and whose copies they are."""
    head = "model.embed_tokens.weight" if model.head is None else "lm_head.weight"
    copies = {name: head for name in places if name.endswith(".shared_head.head.weight")}
    copies |= {name: "model.embed_tokens.weight" for name in places if ".embed_tokens." in name}
    del copies["model.embed_tokens.weight"]
    return copies | ({"lm_head.weight": head} if model.head is None else {})


def _misfit(places: dict[str, Tensor], name: str, shape: Iterable[int]) -> str | None:
    if name not in places:
        return f"unexpected: {name} {list(shape)}"
    if places[name].shape != torch.Size(shape):
        return f"shape: {name} is {list(shape)}, the model has {list(places[name].shape)}"
    return None


# ---- folders ----


def layout(tensors: Iterable[tuple[str, Tensor]], format: Format | None = None) -> Iterator[Entry]:
    """What a folder of these tensors holds in `format` (None: each in its own dtype). Tensors may be on meta."""
    return (stored for name, t in tensors for stored in stored_as(name, t.dtype, tuple(t.shape), format))


def stored_as(name: str, dtype: torch.dtype, shape: tuple[int, ...], format: Format | None) -> Iterator[Entry]:
    """What a tensor is in `format` (None: as it is): itself, or E4M3 values and behind them their scales."""
    if format == "fp8" and _QUANTIZED.search(name):
        yield Entry(name, FLOAT8, shape)
        yield Entry(name + SCALE, torch.float32, block_scales_shape(*shape))
    else:
        keep = format is None or name.endswith("e_score_correction_bias")
        yield Entry(name, dtype if keep else DTYPE[format], shape)


def _encode(name: str, tensor: Tensor, format: Format | None, scales: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    (first, *more) = stored_as(name, tensor.dtype, tuple(tensor.shape), format)
    if not more:
        yield name, tensor.to(first.dtype)
        return
    quantized = quantize_blocks(tensor, keep=None if scales is None else scales.to(tensor.device))
    yield first.name, quantized.values
    yield more[0].name, quantized.scales


def save_folder(
    model: V3Model,
    folder: str | Path,
    tokenizer: Any = None,
    format: Format | None = None,
    scales: Callable[[str], Tensor | None] = lambda weight: None,
    shard_bytes: int | None = None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Writes config.json and safetensors (several files above 4 GiB), and the tokenizer when given, as a folder that
    transformers and vLLM load. One tensor at a time is copied to the host. `tensors` are the weights of a `model` that
    is on meta.

    `format` fp8 is that of DeepSeek's release (E4M3 in blocks of 128x128, the rest BF16); None keeps the model's dtype.
    The scales of blocks that still fit are taken from `scales`, for example a `FolderReader.scale` of the FP8 folder
    that the model was loaded from: unchanged weights then give that folder's bytes. Without them the first FP8 export
    of a BF16 model may move scales by 2^-8 of their value (E4M3 codes stay, where the largest of a block was 448), and
    every later one repeats it exactly. Not atomic: trainer.checkpoint.checkpoint writes into a folder it renames.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(DTYPE[format] if format else model.embed.dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), "torch_dtype": dtype}
    if format == "fp8":
        config["quantization_config"] = FP8_BLOCKS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    entries = layout(named_checkpoint_tensors(model), format)
    with FolderWriter(folder, entries, shard_bytes or SHARD_BYTES) as writer:
        for name, tensor in named_checkpoint_tensors(model) if tensors is None else tensors:
            for stored in _encode(name, tensor, format, scales(name)):
                writer.write(*stored)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def convert_folder(source: str | Path, target: str | Path, format: Format, shard_bytes: int | None = None) -> None:
    """Writes the weights and config.json of one DeepSeek-V3 folder to another in `format`, one tensor at a time and
    without a model. What already is in that format keeps its bytes. Other files are the caller's. Errors: as
    `V3Config.load` and `FolderReader.check` raise."""
    source, target = Path(source), Path(target)
    V3Config.load(source)
    config = read_config(source)
    config.pop("quantization_config", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(DTYPE[format]).removeprefix("torch.")
    if format == "fp8":
        config["quantization_config"] = FP8_BLOCKS
    reader = FolderReader(source)
    reader.check()
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = [entry for name, entry in reader.entries.items() if not name.endswith(SCALE)]
    entries = (stored for entry in weights for stored in stored_as(entry.name, entry.dtype, entry.shape, format))
    with FolderWriter(target, entries, shard_bytes or SHARD_BYTES) as writer:
        for entry, tensor in reader.stored():
            if entry.name.endswith(SCALE):
                continue
            scale = reader.scale(entry.name)
            if scale is not None and format == "fp8" and _QUANTIZED.search(entry.name):
                writer.write(entry.name, tensor)
                writer.write(entry.name + SCALE, scale.float())
                continue
            if scale is not None:
                tensor = Quantized(tensor, scale).dequantize()
            for stored in _encode(entry.name, tensor, format, None):
                writer.write(*stored)


def load_folder(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    recipe: Recipe = "bf16",
    activation_checkpointing: bool = False,
) -> V3Model:
    """The model of a Hugging Face folder, in `dtype` (None: that of the file's embedding). DeepSeek's FP8 weights are
    dequantized. Beside the model, the host holds one tensor at a time. Errors: FileNotFoundError; ValueError as
    `V3Config.load` and `load_weights` raise."""
    config = V3Config.load(folder)
    with torch.device("meta"):
        model = V3Model(config, recipe, activation_checkpointing)
    if dtype is None:
        reader = FolderReader(folder)
        reader.check()
        embedding = reader.entries.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{folder} holds no tensor model.embed_tokens.weight: expected DeepSeek-V3 weights")
        dtype = embedding.dtype
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model
