"""The size of a policy in a Hugging Face folder, counted from the headers of its safetensors files."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlzero.plan.gpu_memory import LayerSize


@dataclass(frozen=True)
class Policy:
    """`active` parameters multiply each token (no embedding, and of the routed experts only the chosen share)."""

    parameters: int
    active: int
    hidden: int
    layers: int
    vocabulary: int
    cache_values: int  # numbers that one token leaves in the cache, all layers together
    by_layer: tuple[LayerSize, ...] = ()
    mtp: int = 0  # parameters of multi-token prediction, in none of the counts above
    fields: dict[str, Any] = field(default_factory=dict, repr=False)  # of config.json


def read_policy(folder: str | Path) -> Policy | None:
    """The policy's size; None where the folder has no weights (yet)."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        return None
    layers = config.get("num_hidden_layers", 0)
    every = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = {name: n for name, n in every.items() if not 0 < layers <= _layer(name)}
    routed = sum(n for name, n in counts.items() if ".experts." in name)
    experts, chosen = (
        config.get("n_routed_experts") or config.get("num_experts") or 0,
        config.get("num_experts_per_tok") or 0,
    )
    embedding = sum(n for name, n in counts.items() if "embed_tokens" in name)
    idle = routed * (1 - chosen / experts) if experts else 0
    if config.get("kv_lora_rank"):
        per_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
        size = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads") or 1, 1)
        per_layer = 2 * heads * size
    by_layer = [[0, 0] for _ in range(layers)]
    for name, n in counts.items():
        if _layer(name) >= 0:
            by_layer[_layer(name)][".experts." in name] += n
    # A folder repeats the embedding and the head in every MTP layer; the trainer has them once.
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    mtp = sum(n for name, n in every.items() if 0 < layers <= _layer(name) and not name.endswith(copies))
    return Policy(
        parameters=sum(counts.values()),
        active=round(sum(counts.values()) - idle - embedding),
        hidden=config.get("hidden_size", 0),
        layers=layers,
        vocabulary=config.get("vocab_size", 0),
        cache_values=per_layer * layers,
        by_layer=tuple(LayerSize(*both) for both in by_layer),
        mtp=mtp,
        fields=config,
    )


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; multi-token-prediction layers are stored behind the last one. -1: none."""
    parts = name.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() else -1
