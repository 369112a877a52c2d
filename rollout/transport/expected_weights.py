"""What a complete weight update holds, for engines that would not notice a missing tensor themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rollout.transport.payload import Payload, travelling
from trainer.checkpoint.folder import SCALE


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face folder, read from the headers of its safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file; save the model there first")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


class ExpectedWeights:
    """What a complete update holds: the names and shapes of the model's checkpoint, in the form that the engine keeps
    (`payload` fp8: with a scale behind each quantized weight, whether the folder has them or not). Layers past the last
    one (the multi-token-prediction head) may stay away unless the engine drafts with them (`prediction`)."""

    def __init__(self, folder: Path, payload: Payload = None, prediction: bool = False):
        config = json.loads((folder / "config.json").read_text())
        self.shapes = checkpoint_shapes(folder)
        if payload == "fp8":
            weights = [(n, shape, torch.bfloat16) for n, shape in self.shapes.items() if not n.endswith(SCALE)]
            self.shapes = {entry.name: entry.shape for entry in travelling(weights, payload)}
        self.tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in self.shapes
        layers = config.get("num_hidden_layers", 0)
        prefix = re.compile(r"model\.layers\.(\d+)\.")
        self.needed = {
            name
            for name in self.shapes
            if prediction or not ((m := prefix.match(name)) and layers and int(m[1]) >= layers)
        }

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes the tensors on; raises ValueError at the first unknown, doubled or wrongly shaped one, and at the end
        when some never came."""
        seen: set[str] = set()
        for name, tensor in weights:
            if self.tied and name == "lm_head.weight":
                continue
            if name not in self.shapes:
                raise ValueError(f"the update holds {name!r}, which the engine's checkpoint does not have")
            if name in seen:
                raise ValueError(f"the update holds {name!r} twice")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, the engine expects {self.shapes[name]}")
            seen.add(name)
            yield name, tensor
        missing = sorted(self.needed - seen)
        if missing:
            raise ValueError(
                f"the update ended without {len(missing)} of {len(self.needed)} tensors, the first: {missing[0]!r}"
            )
