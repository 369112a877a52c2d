"""The form in which the trainer's tensors travel: as they are, with floats cast, or the weights in block-FP8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rollout.transport.base import Layout, TensorSpec
from trainer.checkpoint.folder import SCALE
from trainer.checkpoint.hf import stored_as
from trainer.checkpoint.model_folder import read_config
from trainer.model.v3_config import FP8_BLOCKS
from trainer.precision.quantize import quantize_blocks

# None: as they are; a dtype: floats cast to it; "fp8": E4M3 in blocks of 128x128 where DeepSeek's release has them.
Payload = torch.dtype | Literal["fp8"] | None
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def travelling(layout: Layout, payload: Payload) -> tuple[TensorSpec, ...]:
    """What travels for the trainer's tensors."""
    return tuple(spec for line in layout for spec in _travels(*line, payload))


def travelling_owners(layout: Layout, owners: Sequence[int], payload: Payload) -> tuple[int, ...]:
    """The owner of each of `travelling`."""
    return tuple(o for line, o in zip(layout, owners, strict=True) for _ in _travels(*line, payload))


def _travels(name: str, shape: Sequence[int], dtype: torch.dtype, payload: Payload) -> list[TensorSpec]:
    if payload == "fp8":
        stored = stored_as(name, dtype, tuple(shape), "fp8")
        return [TensorSpec(entry.name, entry.shape, str(entry.dtype).removeprefix("torch.")) for entry in stored]
    if payload is not None and dtype in _FLOATS and not name.endswith("e_score_correction_bias"):
        # A router's bias stays float32: its steps of 1e-3 are below BF16's resolution near 1.
        dtype = payload
    return [TensorSpec(name, tuple(shape), str(dtype).removeprefix("torch."))]


def grouped(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, ...]]:
    """The specs of each tensor of the trainer: one, or an FP8 weight and its scales."""
    waiting: list[TensorSpec] = []
    for spec in specs:
        if waiting and spec.name == waiting[0].name + SCALE:
            waiting.append(spec)
            continue
        if waiting:
            yield tuple(waiting)
        waiting = [spec]
    if waiting:
        yield tuple(waiting)


def put(tensors: Sequence[Tensor], places: Sequence[tuple[Tensor, ...]]) -> None:
    """Writes each tensor to where it travels: cast, or with a place for scales quantized."""
    if places and all(len(place) == 1 for place in places):
        torch._foreach_copy_([place for (place,) in places], tensors)
        return
    pairs = list(zip(tensors, places, strict=True))
    if plain := [(place[0], tensor) for tensor, place in pairs if len(place) == 1]:
        torch._foreach_copy_(*map(list, zip(*plain, strict=True)))
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for tensor, place in pairs:
        if len(place) == 2:
            by_dtype.setdefault(tensor.dtype, []).append((tensor, *place))
    for weights in by_dtype.values():
        if weights[0][0].is_cuda:
            from trainer.precision.triton_quantize import blocks_into

            blocks_into(*zip(*weights, strict=True))
            continue
        for tensor, values, scales in weights:
            quantized = quantize_blocks(tensor)
            values.copy_(quantized.values)
            scales.copy_(quantized.scales)


def engine_payload(folder: str | Path, engine_args: Mapping[str, Any]) -> Payload:
    """The payload for vLLM engines on this folder: "fp8" where they hold block-FP8, because the folder does or because
    `engine_args` asks for it (quantization: fp8). ValueError for a quantization or a model that it is not sent for."""
    config = read_config(folder)
    asked, stored = engine_args.get("quantization"), config.get("quantization_config")
    for found, where in ((stored, f"{folder}/config.json"), (asked, "rollout.engine_args")):
        blocks = found == "fp8" if isinstance(found, str) else found is None or {**found, **FP8_BLOCKS} == found
        if found is not None and not blocks:
            raise ValueError(
                f"{where} asks for quantization {found}: weights are sent to engines in BF16 or in FP8 with blocks of "
                f"128x128 ({FP8_BLOCKS})"
            )
    if (asked or stored) and config.get("model_type") != "deepseek_v3":
        raise ValueError(f"{folder} is a {config.get('model_type')} model: FP8 weights are sent for deepseek_v3 alone")
    return "fp8" if asked or stored else None
