"""Several ranks train one policy: who they are, what each takes, and what they sum.

Ranks are numbered stage by stage (`pp`), within a stage by `dp`; the experts are shared out over `ep` neighbours of
the dp ranks. A stage's dp ranks shard its weights (FSDP2) and deal out the micro-batches; because a loss already has
the denominators of the whole optimizer step, gradients are summed over ranks and never averaged.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.batch import Batch
from trainer.losses import Metrics


class ParallelOptions(BaseModel):
    """How many GPUs train, dp x pp of them, and how they share the work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dp: int = Field(1, ge=1)  # ranks that deal out micro-batches and shard weights, gradients and moments
    ep: int = Field(1, ge=1)  # of these, neighbours that share out the routed experts; divides dp
    pp: int = Field(1, ge=1)  # stages of layers
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"  # of the stages
    # False gathers a layer's weights once for a whole update (ZeRO-2), True before each use (ZeRO-3).
    reshard: bool = False
    # False sums gradients over ranks once per update, True after every micro-batch, which needs no unsharded gradients.
    reduce_each: bool = False
    deadline_s: float = Field(600.0, gt=0)  # of a collective; a rank that keeps the others waiting longer is dead

    @model_validator(mode="after")
    def _divide(self) -> ParallelOptions:
        if self.dp % self.ep:
            raise ValueError(f"ep {self.ep} does not divide dp {self.dp}: expert ranks are a part of the dp ranks")
        return self

    @property
    def ranks(self) -> int:
        return self.dp * self.pp


@dataclass(frozen=True)
class Rendezvous:
    """Which of the ranks this process is and where they meet: host:port of rank 0. `listening`: on rank 0, the file
    descriptor of a socket that is bound to the address already, so that nobody takes the port meanwhile and none but
    that address is listened at."""

    rank: int
    address: str
    listening: int | None = None

    @classmethod
    def from_environment(cls) -> Rendezvous:
        """As torchrun sets it. ValueError where it did not."""
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"{', '.join(missing)} not set: start with torchrun, or give a Rendezvous")
        return cls(int(os.environ["RANK"]), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")

    def meeting(self, size: int, deadline: timedelta) -> dict[str, Any]:
        """How init_process_group is told where. At an address of torchrun's there is a store already."""
        if self.address == f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}":
            return {"init_method": f"tcp://{self.address}"}
        host, _, port = self.address.rpartition(":")
        first = self.rank == 0
        return {"store": dist.TCPStore(host, int(port), size, first, deadline, master_listen_fd=self.listening)}


@dataclass(frozen=True)
class Share:
    """A micro-batch of this rank. One that is not `real` fills a gap: it runs because the others' collectives need
    this rank, and counts for nothing."""

    batch: Batch
    real: bool = True
    index: int = -1  # in the list that was dealt out


class Ranks:
    """This process among `options.ranks`. With one rank nothing here communicates, and nothing is reordered."""

    def __init__(self, options: ParallelOptions, device: torch.device, rendezvous: Rendezvous | None = None) -> None:
        self.options, self.device = options, device
        self.rank, self.size = 0, options.ranks
        self.dp_rank = self.ep_rank = self.pp_rank = 0
        if self.size == 1:
            return
        rendezvous = rendezvous or Rendezvous.from_environment()
        self.rank = rendezvous.rank
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} (dp {options.dp} x pp {options.pp}): no such rank")
        if not dist.is_initialized():
            deadline = timedelta(seconds=options.deadline_s)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                **rendezvous.meeting(self.size, deadline),
                rank=self.rank,
                world_size=self.size,
                timeout=deadline,
            )
        self.pp_rank, self.dp_rank = divmod(self.rank, options.dp)
        self.ep_rank = self.dp_rank % options.ep
        shape = (options.pp, options.dp // options.ep, options.ep)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "efsdp", "ep"))
        self.dp: DeviceMesh = mesh["efsdp", "ep"]._flatten("dp")
        self.efsdp: DeviceMesh = mesh["efsdp"]
        self.dp_group, self.pp_group = self.dp.get_group(), mesh.get_group("pp")
        self.ep_group = self._expert_group(torch.arange(self.size).view(-1, options.ep).tolist())
        # The experts' whole tensors: split over ep first, each part over efsdp. A mesh for each stage, all made by all
        # ranks: torch 2.11 cannot slice one from a mesh of all stages, nor gather over a dimension of one rank.
        turned = torch.arange(self.size).view(shape).transpose(1, 2).contiguous()
        stages = [DeviceMesh(device.type, stage, mesh_dim_names=("ep", "efsdp")) for stage in turned]
        self.experts: DeviceMesh = mesh["ep"] if options.dp == options.ep else stages[self.pp_rank]

    def _expert_group(self, ranks: list[list[int]]) -> dist.ProcessGroup | None:
        """A group of its own, also where the mesh has one of these ranks: what the experts send must not queue up
        behind the weights and gradients of the dp ranks."""
        if self.options.ep == 1:
            return None
        groups = [dist.new_group(part) for part in ranks]  # all ranks make all groups
        return next(group for group, part in zip(groups, ranks, strict=True) if self.rank in part)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def norm_groups(self, name: str, parameter: Tensor) -> Sequence[dist.ProcessGroup]:
        """Over which squares are summed for the norm of the gradient: each of its elements is on one rank alone."""
        return () if self.size == 1 else (dist.group.WORLD,)

    # --- dealing out -------------------------------------------------------------------------------------------------

    def share(self, batches: Sequence[Batch]) -> list[Share]:
        """This rank's micro-batches, as many on every rank: dealt out by size, there and back, so that the ranks' sums
        and what runs at the same time are as even as they can be; gaps are filled."""
        every = [Share(batch, index=i) for i, batch in enumerate(batches)]
        count = self.options.dp
        if count == 1 or not every:
            return every
        order = sorted(every, key=lambda s: (-len(s.batch.tokens), s.index))
        mine = []
        for start in range(0, len(order), count):
            wave = order[start : start + count]
            place = self.dp_rank if (start // count) % 2 == 0 else count - 1 - self.dp_rank
            mine.append(wave[place] if place < len(wave) else Share(filler(batches[0]), real=False))
        # gaps last: what a rank counts over its real micro-batches ends before them
        return sorted(mine, key=lambda s: not s.real)

    def even(self, shares: Sequence[Share], like: Batch | None) -> list[Share]:
        """`shares` filled up to the longest list of any rank, where ranks may have come to different lists."""
        if self.options.dp == 1:
            return list(shares)
        longest = torch.tensor(len(shares), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.dp_group)
        missing = int(longest) - len(shares)
        return [*shares, *(Share(filler(like), real=False) for _ in range(missing))]

    def collect(self, shares: Sequence[Share], values: Sequence[Any], count: int) -> list[Any]:
        """The value of every one of the `count` batches that were dealt out, on every rank."""
        mine = {share.index: value for share, value in zip(shares, values, strict=True) if share.real}
        if self.options.dp > 1:
            parts: list[Any] = [None] * self.options.dp
            dist.all_gather_object(parts, mine, group=self.dp_group)
            mine = {index: value for part in parts for index, value in part.items()}
        return [mine[i] for i in range(count)]

    # --- summing -----------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the dp ranks, in place."""
        if self.options.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def sum_metrics(self, parts: Sequence[Metrics]) -> list[Metrics]:
        """The metrics of all ranks' micro-batches, added up; of equal names on every rank."""
        if self.options.dp == 1 or not parts:
            return list(parts)
        names = sorted(parts[0])
        pairs = torch.stack([torch.stack([part[name].double() for part in parts]).sum(0) for name in names])
        return [dict(zip(names, self.sum(pairs).unbind(0), strict=True))]

    def barrier(self) -> None:
        """Returns once every rank is here, the device's work done or not."""
        if self.size > 1:
            self.agree(None)

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def micro_batch(self, module: nn.Module, last: bool) -> None:
        """Called before every forward pass with a backward pass: before the `last` one of an update, gradients are
        summed over ranks at its end and weights gathered for it are given up."""
        if self.options.dp == 1:
            return
        from torch.distributed.fsdp import FSDPModule  # 2 s, of which one rank has nothing

        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last or self.options.reduce_each)
        module.set_reshard_after_backward(last or self.options.reshard)


def filler(like: Batch) -> Batch:
    """A micro-batch of eight tokens with every stream of `like`. Its loss is to be multiplied by 0."""
    n = 8
    values: dict[str, Any] = {}
    for field in dataclasses.fields(like):
        value = getattr(like, field.name)
        if isinstance(value, Tensor) and field.name not in ("bounds", "sequence_ids"):
            values[field.name] = value.new_zeros(n, *value.shape[1:])
    values["positions"] = torch.arange(n, dtype=like.positions.dtype, device=like.positions.device)
    values["bounds"] = like.bounds.new_tensor([0, n])
    values["loss_mask"] = values["positions"] > 0
    values["sequence_ids"] = None
    if like.routed_experts is not None:
        values["routed_experts"] -= 1  # the router chooses
    return dataclasses.replace(like, **values)
