"""What a complete weight update holds, for engines that would not notice a missing tensor themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rollout.transport.payload import Payload, travelling
from trainer.checkpoint.folder import SCALE, FolderReader
from trainer.checkpoint.model_folder import read_config, text_fields

HEAD = "lm_head.weight"



class ExpectedWeights:
    """What a complete update holds: the names and shapes that the trainer sends, in the form that the engine keeps
    (`payload` fp8: with a scale behind each quantized weight, whether the folder has them or not). Layers past the last
    one (the multi-token-prediction head) may stay away unless the engine drafts with them (`prediction`). The
    head of a tied model is passed over where it comes (but not DeepSeek-V3's: vLLM does not tie it).

    DeepSeek-V3's names are those of its folder. For other models transformers knows them, whatever the folder calls its
    tensors (old names, copies of a tied head) and however it stores them (.bin)."""

    def __init__(self, folder: Path, payload: Payload = None, prediction: bool = False):
        config = read_config(folder)
        layers, prefix = text_fields(config).get("num_hidden_layers", 0), re.compile(r"model\.layers\.(\d+)\.")
        if config.get("model_type") == "deepseek_v3":
            self.shapes = {name: entry.shape for name, entry in FolderReader(folder).entries.items()}
        else:
            from trainer.hf_model import checkpoint_shapes

            self.shapes = checkpoint_shapes(folder)
        if payload == "fp8":
            weights = [(n, shape, torch.bfloat16) for n, shape in self.shapes.items() if not n.endswith(SCALE)]
            self.shapes = {entry.name: entry.shape for entry in travelling(weights, payload)}
        self.tied = bool(config.get("tie_word_embeddings")) and HEAD not in self.shapes
        self.needed = {
            name
            for name in self.shapes
            if prediction or not ((m := prefix.match(name)) and layers and int(m[1]) >= layers)
        }

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`checked_buckets` of single tensors."""
        for bucket in self.checked_buckets([pair] for pair in weights):
            yield from bucket

    def checked_buckets(self, buckets: Iterable[list[tuple[str, Tensor]]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Passes the tensors on; raises ValueError at the first unknown, doubled or wrongly shaped one, and at the end
        when some never came."""
        seen: set[str] = set()
        for bucket in buckets:
            yield [(name, tensor) for name, tensor in bucket if self._fits(name, tensor, seen)]
        missing = sorted(self.needed - seen)
        if missing:
            raise ValueError(
                f"the update ended without {len(missing)} of {len(self.needed)} tensors, the first: {missing[0]!r}"
            )

    def _fits(self, name: str, tensor: Tensor, seen: set[str]) -> bool:
        """Whether the engine has a place of its own for the tensor, which is then among the `seen` ones."""
        if self.tied and name == HEAD:
            return False
        if name not in self.shapes:
            raise ValueError(f"the update holds {name!r}, which the engine's checkpoint does not have")
        if name in seen:
            raise ValueError(f"the update holds {name!r} twice")
        if tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, the engine expects {self.shapes[name]}")
        seen.add(name)
        return True
