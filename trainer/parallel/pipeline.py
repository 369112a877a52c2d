"""Stages of layers on several ranks, run by the schedules of torch.distributed.pipelining.

A schedule moves one tensor of one shape from stage to stage, the hidden states; whatever else a stage needs of a
micro-batch (positions, documents, the loss's streams) lies on every rank already, and travels as the micro-batch's
number. Micro-batches are therefore filled up to one length, by documents that have no loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from trainer.batch import Batch
from trainer.model.documents import group_documents
from trainer.model.moe import Routing
from trainer.model.rope import turns
from trainer.model.v3 import V3Model
from trainer.parallel.ranks import filler
from trainer.policy import Head, PolicyOptions, V3Policy

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
FILLER_TOKENS = 128  # of a document that only fills up


def stages_of(schedule: str, rank: int, ranks: int) -> list[int]:
    """The stages of a rank, in the order of the layers: one, two that go round (interleaved), or two that make a V
    whose first and last stage are rank 0's."""
    if schedule == "1f1b":
        return [rank]
    return [rank, rank + ranks] if schedule == "interleaved" else [rank, 2 * ranks - 1 - rank]


def split_layers(layers: int, stages: int) -> list[range]:
    """The layers of every stage: as even as can be where embedding and head count as a layer each. ValueError for
    fewer layers than stages."""
    if layers < stages:
        raise ValueError(f"{layers} layers do not make {stages} stages: lower pp, or choose schedule 1f1b")
    bounds = [round(s * (layers + 2) / stages) - 1 for s in range(1, stages)]
    bounds = [0, *bounds, layers]
    for s in range(1, stages):  # no stage without a layer
        bounds[s] = min(max(bounds[s], bounds[s - 1] + 1), layers - (stages - s))
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


class Stage(nn.Module):
    """Some layers of a V3 model, under the names they have in it; the first also embeds, the last norms and has the
    head. `batches` are those of the run; `forward` is given one's number."""

    def __init__(self, model: V3Model, layers: range, device: torch.device) -> None:
        super().__init__()
        self.config, self.device = model.config, device
        self.activation_checkpointing = model.activation_checkpointing
        self.first, self.last = layers.start == 0, layers.stop == len(model.layers)
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.embed = model.embed if self.first else None
        self.norm = model.norm if self.last else None
        self.head = model.head if self.last else None
        self.batches: Sequence[Batch] = ()
        self.real_tokens: Sequence[int] = ()  # of every batch; those behind them are not counted
        self.load: dict[int, Int[Tensor, " experts"]] = {}  # tokens sent to each expert, by layer

    def forward(self, x: Tensor, *, number: Int[Tensor, " 1"]) -> Float[Tensor, "n hidden"]:
        batch = self.batches[int(number)]
        documents = group_documents(batch.bounds, device=self.device)
        turn = turns(self.config, batch.positions.to(self.device))
        if self.first:
            x = F.embedding(x[0], self.embed)
        for name, layer in self.layers.items():
            index, replay = int(name), None
            if batch.routed_experts is not None and index >= self.config.first_k_dense_replace:
                row = index - self.config.first_k_dense_replace
                replay = batch.routed_experts[:, row].to(self.device, torch.int64)
            if self.activation_checkpointing is True and torch.is_grad_enabled():
                x, routing = torch.utils.checkpoint.checkpoint(layer, x, turn, documents, replay, use_reentrant=False)
            else:
                x, routing = layer(x, turn, documents, replay)
            if routing is not None and torch.is_grad_enabled():
                self._count(index, routing, self.real_tokens[int(number)])
        return x if self.norm is None else self.norm(x)

    def _count(self, index: int, routing: Routing, tokens: int) -> None:
        """Of the first `tokens` tokens; those behind them fill up."""
        chosen = routing.experts[:tokens].flatten()
        if index not in self.load:
            self.load[index] = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=chosen.device)
        self.load[index].scatter_add_(0, chosen, torch.ones_like(chosen))


class LastStagePolicy(V3Policy):
    """The policy's view of what the last stage sends: its `logprobs` take the arrived hidden states."""

    def __init__(self, stage: Stage, options: PolicyOptions) -> None:
        super().__init__(stage, options, stage.device)  # its module has a config and a head, all that is used of it
        self.arrived: Tensor | None = None

    def _measured_hidden(self, batch: Batch, measure) -> Float[Tensor, "n hidden"]:
        assert self.arrived is not None and measure is None
        return self.arrived

    def head(self) -> Head:
        return Head(self.module.head)


class Pipeline:
    """This rank's stages of `model`, which may lie whole on the CPU or on `device`; what other ranks need of it is
    dropped. Collective: every rank of `group` calls the same methods with the same batches."""

    def __init__(
        self, model: V3Model, options: PolicyOptions, schedule: str, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        if model.head is None:
            raise ValueError("a tied head would lie on the first and on the last stage: pp needs an untied one")
        if len(model.mtp_layers):
            raise ValueError("multi-token prediction does not run in stages: use num_nextn_predict_layers 0, or pp 1")
        self.schedule, self.group, self.device, self.config = schedule, group, device, model.config
        mine = stages_of(schedule, group.rank(), group.size())
        self.count = group.size() * len(mine)
        layers = split_layers(len(model.layers), self.count)
        self.stages = {index: Stage(model, layers[index], device).to(device) for index in mine}
        last = self.stages.get(self.count - 1)
        self.policy = None if last is None else LastStagePolicy(last, options)
        self.dtype = model.norm.weight.dtype

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Of this rank's stages, under the whole model's names."""
        return [pair for stage in self.stages.values() for pair in stage.named_parameters()]

    def run(self, batches: Sequence[Batch], loss_of: Callable[[LastStagePolicy, Batch], Tensor]) -> None:
        """Forward and backward passes of all `batches`; gradients add up in the parameters. `loss_of` is called on the
        rank of the last stage alone, with a policy whose `logprobs` are of the arrived hidden states."""
        longest = max(len(batch.tokens) for batch in batches)
        filled = [fill_up(batch, longest) for batch in batches]
        real = len(filled)
        # Schedules want a micro-batch for every stage at least, the interleaved one a multiple of the ranks.
        while len(filled) < self.count or len(filled) % self.group.size():
            filled.append(fill_up(filler(batches[0]), longest) if longest >= 8 else filled[0])

        def loss(hidden: Tensor, number: Tensor) -> Tensor:
            assert self.policy is not None
            at = int(number)
            self.policy.arrived = hidden
            if at >= real:  # fills the schedule: counts for nothing
                return 0.0 * hidden.sum(dtype=torch.float32)
            return loss_of(self.policy, filled[at])

        for stage in self.stages.values():
            stage.batches = filled
            stage.real_tokens = [len(batch.tokens) for batch in batches] + [0] * (len(filled) - real)
        stages = [self._stage(index, longest) for index in sorted(self.stages)]
        kind = SCHEDULES[self.schedule]
        given = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        schedule = kind(given, len(filled), loss_fn=loss, scale_grads=False)
        numbers = torch.arange(len(filled))
        first = 0 in self.stages
        tokens = [torch.stack([batch.tokens for batch in filled]).to(self.device)] if first else []
        target = numbers if self.policy is not None else None
        losses: list[Tensor] | None = [] if self.policy is not None else None
        schedule.step(*tokens, target=target, losses=losses, return_outputs=False, number=numbers)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[Float[Tensor, " n"]]:
        """Log-probabilities of the loss masks' tokens, 0 elsewhere, on the CPU of every rank. One stage after the
        other, micro-batches overlapping as stages allow: torch's V-shaped schedules cannot run forward alone."""
        found: list[Tensor] = []
        for stage in self.stages.values():
            stage.batches = batches
        for at, batch in enumerate(batches):
            hidden = torch.empty(0)
            for index in sorted(self.stages):
                if index == 0:
                    hidden = batch.tokens[None].to(self.device)
                elif index - 1 not in self.stages:
                    shape = (len(batch.tokens), self.config.hidden_size)
                    hidden = torch.empty(shape, dtype=self.dtype, device=self.device)
                    dist.recv(hidden, self._rank_of(index - 1), group=self.group)
                hidden = self.stages[index](hidden, number=torch.tensor([at]))
                if index == self.count - 1:
                    assert self.policy is not None
                    self.policy.arrived = hidden
                    found.append(self.policy.logprobs(batch)[0].cpu())
                elif index + 1 not in self.stages:
                    dist.send(hidden, self._rank_of(index + 1), group=self.group)
        box = [found]
        dist.broadcast_object_list(box, self._rank_of(self.count - 1), group=self.group, device=torch.device("cpu"))
        return box[0]

    def _rank_of(self, stage: int) -> int:
        """Global rank that has the stage."""
        ranks = range(self.group.size())
        owner = next(r for r in ranks if stage in stages_of(self.schedule, r, self.group.size()))
        return dist.get_global_rank(self.group, owner)

    def take_load(self) -> dict[int, Int[Tensor, " experts"]]:
        """Tokens sent to each expert since the last call, by layer, of this rank's layers."""
        taken = {index: load for stage in self.stages.values() for index, load in stage.load.items()}
        for stage in self.stages.values():
            stage.load = {}
        return taken

    def _stage(self, index: int, tokens: int) -> PipelineStage:
        hidden = torch.zeros(tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        hidden.requires_grad_()  # a schedule asks the examples what has a gradient
        entering = torch.zeros(1, tokens, dtype=torch.int64, device=self.device) if index == 0 else hidden
        return PipelineStage(
            self.stages[index], index, self.count, self.device, input_args=(entering,), output_args=(hidden,),
            group=self.group, dw_builder=lambda: _no_gradients,
        )  # fmt: skip


def _no_gradients() -> None:
    """What is left of a stage's backward pass after the gradients of its inputs. The V-shaped schedules would make
    those of weights later, when there is time; but torch 2.11 cannot split a pass whose nodes are functions of
    Python's, as our kernels' are on a GPU, so both are made at once."""


def fill_up(batch: Batch, tokens: int) -> Batch:
    """`batch` with documents of at most FILLER_TOKENS that have no loss behind it, `tokens` tokens in all."""
    missing = tokens - len(batch.tokens)
    if not missing:
        return batch
    lengths = [min(FILLER_TOKENS, missing - start) for start in range(0, missing, FILLER_TOKENS)]
    values = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and field.name not in ("bounds", "sequence_ids"):
            values[field.name] = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    positions = torch.cat([torch.arange(n) for n in lengths]).to(batch.positions)
    values["positions"] = torch.cat([batch.positions, positions])
    ends = int(batch.bounds[-1]) + torch.tensor(lengths).cumsum(0)
    values["bounds"] = torch.cat([batch.bounds, ends.to(batch.bounds)])
    if batch.routed_experts is not None:
        values["routed_experts"][-missing:] = -1  # the router chooses
    return dataclasses.replace(batch, **values)
