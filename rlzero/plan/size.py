"""The size of a policy: parameters by layer, from the headers of a folder's files or from an architecture."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.model_folder import model_fields

if TYPE_CHECKING:
    from trainer.model.v3_config import V3Config


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer: those that every rank computes with, and the routed experts'. `quantized` of the dense
    ones are multiplied in the recipe's precision."""

    dense: int = 0
    routed: int = 0
    quantized: int = 0

    @property
    def all(self) -> int:
        return self.dense + self.routed


@dataclass(frozen=True)
class PolicySize:
    """Parameters; router biases, FP8 scales and the copies of a tied table are none. `active` ones multiply each token:
    no embedding (unless it is the head, too), and of the routed experts the chosen share."""

    parameters: int
    active: int
    hidden: int
    layers: int
    vocabulary: int
    cache_values: int  # numbers that one token leaves in the cache, all layers together
    by_layer: tuple[LayerSize, ...] = ()
    mtp_layers: tuple[LayerSize, ...] = ()  # of multi-token prediction, in none of the counts above
    mtp_in_folder: int = 0  # the same with the copies of embedding and head that a folder repeats
    fields: dict[str, Any] = field(default_factory=dict, repr=False)  # of config.json

    @property
    def mtp(self) -> int:
        return sum(layer.all for layer in self.mtp_layers)


def size_of(fields: dict[str, Any], shapes: Mapping[str, list[int]]) -> PolicySize:
    """The size of the model that config.json's `fields` describe, whose checkpoint holds tensors of `shapes`."""
    layers, tied = fields.get("num_hidden_layers", 0), bool(fields.get("tie_word_embeddings"))
    skipped = ("e_score_correction_bias", "weight_scale_inv", *(("lm_head.weight",) if tied else ()))
    every = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(skipped)}
    found = [[0, 0, 0] for _ in range(max([layers - 1, *map(_layer, every)]) + 1)]
    main = embedding = copied = 0
    for name, n in every.items():
        layer = _layer(name)
        if layer < layers or not layers:
            main += n
            embedding += n if "embed_tokens" in name else 0
        elif name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            copied += n  # a folder repeats the embedding and the head in every MTP layer; the trainer has them once
            continue
        if layer >= 0:
            routed = ".experts." in name
            found[layer][routed] += n
            found[layer][2] += n if not routed and name.endswith(("proj.weight", "mqa.weight")) else 0
    by_layer = [LayerSize(*counts) for counts in found]
    routed = sum(layer.routed for layer in by_layer[:layers])
    experts = fields.get("n_routed_experts") or fields.get("num_experts") or 0
    idle = routed * (experts - (fields.get("num_experts_per_tok") or 0)) // experts if experts else 0
    mtp = tuple(by_layer[layers:]) if layers else ()
    return PolicySize(
        parameters=main,
        active=main - idle - (0 if tied else embedding),
        hidden=fields.get("hidden_size", 0),
        layers=layers,
        vocabulary=fields.get("vocab_size", 0),
        cache_values=_cached_values(fields) * layers,
        by_layer=tuple(by_layer[:layers]),
        mtp_layers=mtp,
        mtp_in_folder=sum(layer.all for layer in mtp) + copied,
        fields=fields,
    )


def read_size(folder: str | Path) -> PolicySize | None:
    """The size of the policy in a Hugging Face folder; None where it has no weights (yet)."""
    folder = Path(folder)
    fields = model_fields(folder)
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return size_of(fields, shapes) if fields and shapes else None


def size_of_architecture(model: V3Config) -> tuple[PolicySize, dict[str, int]]:
    """The size of a V3 architecture, counted tensor by tensor on torch's meta device, and the bytes of its Hugging Face
    folder by format ("bf16", "fp8")."""
    import torch

    from trainer.checkpoint import hf
    from trainer.model.v3 import V3Model

    with torch.device("meta"):
        tensors = dict(hf.named_checkpoint_tensors(V3Model(model).to(torch.bfloat16)))
    folders = {f: sum(e.nbytes for e in hf.layout(tensors.items(), f)) for f in ("bf16", "fp8")}
    return size_of(model.to_hf(), {name: list(tensor.shape) for name, tensor in tensors.items()}), folders


def _cached_values(fields: dict[str, Any]) -> int:
    if fields.get("kv_lora_rank"):
        return fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
    heads = max(fields.get("num_attention_heads") or 1, 1)
    size = fields.get("head_dim") or fields.get("hidden_size", 0) // heads
    return 2 * (fields.get("num_key_value_heads") or fields.get("num_attention_heads") or 0) * size


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; multi-token-prediction layers are stored behind the last one. -1: none."""
    parts = name.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() else -1
