"""Models of transformers, loaded the same way for the trainer and the torch engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

# mean |difference in log p| below which two ways to compute the same are taken for equal
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
disable_progress_bar()  # a bar per checkpoint or update would run across the display of a run


def load_config(path: str | Path) -> PreTrainedConfig:
    """The folder's configuration. ValueError for a type that only code in the folder knows: it is never run."""
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_model(path: str | Path, config: PreTrainedConfig, longest: int | None, **options: Any) -> PreTrainedModel:
    """The causal language model in `path`, its rotation held fixed for sequences of up to `longest` tokens (None: all
    that its positions allow); `options` go to from_pretrained. ValueError for a folder without some of its tensors, and
    where config.json ties embedding and head and the folder holds two different ones."""
    model, found = AutoModelForCausalLM.from_pretrained(
        path, config=config, trust_remote_code=False, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} tensors of its model, the first: {missing[0]}; is it complete?")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False) and head.weight is not embedding.weight:
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings: true, but the weights hold a head (lm_head.weight) that "
            "differs from the embedding. Set tie_word_embeddings to false there, or save the model without lm_head"
        )
    return hold_rotation(model, longest)


def hold_rotation(model: PreTrainedModel, longest: int | None) -> PreTrainedModel:
    """Makes rotations that follow the longest position of a batch (LongRoPE, dynamic NTK) those of a sequence of
    `longest` tokens, for good: else a token's log-probability would depend on what is packed beside it, and cached
    keys would turn with other factors than new ones. Returns the model."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        config = module.config
        length = longest or config.max_position_embeddings
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind != "longrope" and "dynamic" not in kind:
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            device = getattr(module, f"{prefix}inv_freq").device
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length, layer_type=layer_type)
            for name in ("inv_freq", "original_inv_freq"):
                module.register_buffer(f"{prefix}{name}", frequencies.clone(), persistent=False)
            setattr(module, f"{prefix}attention_scaling", scaling)
            if layer_type is None:
                module.rope_type = "default"
            else:
                kinds[layer_type] = "default"
    return model


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, live tensor or a part of one), tied copies left out. Fused tensors are taken apart again."""
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    yield from revert_weight_conversion(model, state).items()


def checkpoint_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `named_tensors` gives of the model in `path`, without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(path), trust_remote_code=False)
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
