"""Which part of a checkpoint tensor vLLM copies where. Its `load_weights` runs once over tensors without memory, and
the copies that it asks for are written down instead of made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Weights = Iterable[tuple[str, Tensor]]
DERIVED = ("W_UV", "W_UK_T")  # of MLA: halves of kv_b_proj, absorbed into query and output


@dataclass(frozen=True)
class Copy:
    """A part of a checkpoint tensor (as strides and offset into it, contiguous) and where the engine keeps it."""

    target: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool  # all of the tensor, in its order

    def part(self, tensor: Tensor) -> Tensor:
        if self.whole:
            return tensor.view(self.size)
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class CannotPlan(RuntimeError):
    """vLLM does more with some tensor than copying it. The message says what."""


class _Recorder(TorchDispatchMode):
    """Writes down copies out of tensors without memory instead of making them."""

    def __init__(self, sources: Mapping[int, str]):
        super().__init__()
        self.sources = sources  # storage -> checkpoint name
        self.copies: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            name = self.sources.get(source.untyped_storage()._cdata) if source.is_meta else None
            if name is None or target.is_meta:
                raise CannotPlan(f"what it copies from {tuple(source.shape)} is no part of a checkpoint tensor")
            self.copies.setdefault(name, []).append((target, source))
            return target
        if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default) and not args[0].is_meta:
            return args[0]  # padding, which is filled already
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def plan_copies(
    load: Callable[[Weights], Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, list[Copy]]:
    """The copies that `load` makes of checkpoint tensors of these shapes, by name; nothing is changed. Raises
    CannotPlan where `load` does anything else with one of them."""
    dtypes = dtypes or {}
    tensors = {name: torch.empty(shape, dtype=dtypes.get(name), device="meta") for name, shape in shapes.items()}
    recorder = _Recorder({tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()})
    try:
        with recorder:
            load(iter(tensors.items()))
    except CannotPlan:
        raise
    except Exception as error:
        raise CannotPlan(f"{type(error).__name__}: {error}") from error
    plan: dict[str, list[Copy]] = {}
    for name, copies in recorder.copies.items():
        for target, source in copies:
            if target.shape != source.shape:
                raise CannotPlan(f"{name} is broadcast from {tuple(source.shape)} to {tuple(target.shape)}")
            offset = source.storage_offset()
            whole = source.is_contiguous() and offset == 0 and source.numel() == tensors[name].numel()
            copy = Copy(target.detach(), tuple(source.shape), tuple(source.stride()), offset, whole)
            plan.setdefault(name, []).append(copy)
    return plan


@contextmanager
def checkpoint_form(model: torch.nn.Module) -> Iterator[None]:
    """The parameters as the model's loaders know them, over the memory that its kernels read. Layers that quantize
    replace theirs by plain ones, which nothing can be loaded into; vLLM keeps what they were for its own reload.
    Where a kernel's tensor has another shape or dtype, it stays what it is."""
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    held: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        for layer in model.modules():
            for name, form in get_layerwise_info(layer).restore_metadata[0].items():
                parameter = layer._parameters.get(name)
                if parameter is None or (parameter.shape, parameter.dtype) != (form.shape, form.dtype):
                    continue
                turned = parameter.data
                turned.__class__, turned.__dict__ = form.__class__, form.__dict__.copy()
                restore_layer_refs(turned, layer)
                turned.weight_loader = _get_original_loader(turned)  # not the one that waits for a whole layer
                held.append((layer, name, parameter))
                layer._parameters[name] = turned
        yield
    finally:
        for layer, name, parameter in held:
            layer._parameters[name] = parameter


def unwritten(plan: Mapping[str, list[Copy]], model: torch.nn.Module) -> list[str]:
    """Parameters of the model that no copy of the plan writes to; derived ones are computed."""
    written = {copy.target.untyped_storage().data_ptr() for copies in plan.values() for copy in copies}
    parameters = [(n, p) for n, p in model.named_parameters() if p.numel() and n.rpartition(".")[2] not in DERIVED]
    return [name for name, parameter in parameters if parameter.untyped_storage().data_ptr() not in written]


@torch.no_grad()
def copy_weights(plan: Mapping[str, list[Copy]], weights: Weights) -> None:
    """Makes the plan's copies. A tensor that the plan does not know is one that the engine has no place for
    (`load_weights` dropped it too)."""
    for name, tensor in weights:
        tensor = tensor.detach().contiguous()
        for copy in plan.get(name, ()):
            copy.target.copy_(copy.part(tensor), non_blocking=True)
