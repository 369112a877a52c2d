"""The optimizer's state of several ranks in a checkpoint folder, resumable on any number of them.

Written by torch.distributed.checkpoint (DCP), each rank its shards, under the names that one rank uses for whole
tensors (`master/...`, `exp_avg/...`): so one rank reads what many wrote, and many read one rank's safetensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint.checkpoint import SHARDS, WHOLE
from trainer.optimizer import Optimizer
from trainer.parallel.sharded_policy import ShardedV3Policy


def save_shards(folder: Path, policy: ShardedV3Policy, optimizer: Optimizer) -> None:
    """Writes `folder / SHARDS`. A collective."""
    state: dict[str, Tensor] = {}
    for key, tensor in optimizer.state().items():
        kind, _, name = key.partition("/")
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        state[key] = local if kind == "step" else policy.distributed(name, local)
    if policy.dtype != torch.float32:
        for name, parameter in policy.module.named_parameters():
            if isinstance(parameter, DTensor):  # its own master
                state[f"master/{name}"] = policy.distributed(name, parameter.detach().to_local())
    dcp.save(state, checkpoint_id=folder / SHARDS)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """What several ranks wrote to `folder / SHARDS`, whole, on the CPU, for one rank."""
    state = {key: torch.empty(found.size, dtype=found.properties.dtype) for key, found in _listed(folder).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
        dcp.load(state, checkpoint_id=folder / SHARDS, no_dist=True)
    return state


def load_shards(folder: Path, policy: ShardedV3Policy, optimizer: Optimizer, steps: int) -> None:
    """This rank's part of what any number of ranks wrote: DCP's files or one rank's safetensors. Errors: ValueError
    for a state that does not fit the policy; FileNotFoundError without one. A collective."""
    parts = policy.parts()
    if (folder / SHARDS).is_dir():
        state = {}
        for key, found in _listed(folder).items():
            part = _part_of(key, parts)
            shape, device = (found.size, "cpu") if part is None else (part.shape, part.device)
            # On the parameters' device: of CPU memory, a DTensor of a GPU mesh makes a copy, and only that is filled.
            state[key] = torch.empty(shape, dtype=found.properties.dtype, device=device)
        whole = {
            key: tensor if _part_of(key, parts) is None else policy.distributed(key.partition("/")[2], tensor)
            for key, tensor in state.items()
        }
        dcp.load(whole, checkpoint_id=folder / SHARDS)
    else:
        state = dict(_slices(folder / WHOLE, policy, parts))
    for name, parameter in policy.module.named_parameters():
        if policy.dtype != torch.float32 and isinstance(parameter, DTensor):
            master = state.pop(f"master/{name}", None)
            if master is None:
                raise ValueError(f"the optimizer state does not fit this policy: missing master/{name}")
            parts[name].copy_(master)
    parameters = dict(policy.module.named_parameters())
    for key, tensor in state.items():
        parameter = parameters.get(key.partition("/")[2])
        if isinstance(parameter, DTensor) and not key.startswith("step/"):
            state[key] = DTensor.from_local(
                tensor.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
    optimizer.load_state(state, steps)


def _listed(folder: Path) -> dict[str, TensorStorageMetadata]:
    found = dcp.FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    return {key: entry for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _part_of(key: str, parts: dict[str, Tensor]) -> Tensor | None:
    """The part of the policy that a state belongs to; None for a count, and for what the policy does not have."""
    kind, _, name = key.partition("/")
    return None if kind == "step" else parts.get(name)


def _slices(file: Path, policy: ShardedV3Policy, parts: dict[str, Tensor]):
    with safe_open(file, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (no dictionary)
            part = _part_of(key, parts)
            if part is None:
                yield key, handle.get_tensor(key)
                continue
            first, rows = policy.rows_of(key.partition("/")[2])
            yield key, handle.get_slice(key)[first : first + rows]
