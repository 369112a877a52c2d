"""AdamW and Muon with FP32 master weights, moments in FP32 or BF16, schedules, global-norm clipping."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from trainer import masters
from trainer.transfer import Readback


class OptimizerOptions(BaseModel):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and its schedule; defaults: R1-Zero's lr (arXiv 2501.12948),
    betas and clipping of DeepSeek-V3 (arXiv 2412.19437, section 4.2), which keeps both moments in BF16 (3.3.2).

    `muon` updates the matrices, embedding and head excepted, by torch.optim.Muon instead, its step scaled to AdamW's
    so that lr and weight_decay stay what they are (Moonlight, arXiv 2502.16982, eq. 4). A stack [experts, out, in] is
    that many matrices; `w13`, gate above up, counts as one. AdamW keeps the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-6, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    total_steps: int | None = Field(None, gt=0)  # optimizer steps at whose end min_lr_ratio is reached
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)  # matrices only: no norms, no biases
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    moments: Literal["float32", "bfloat16"] = "float32"  # what AdamW's are kept in; Muon's momentum is float32
    max_grad_norm: float = Field(1.0, gt=0)
    # A router's bias moves by this after a step (section 2.1.2); 0: never, RL keeps the balance of pre-training.
    router_bias_gamma: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _decay_needs_an_end(self) -> OptimizerOptions:
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule {self.schedule} needs total_steps above warmup_steps ({self.warmup_steps}), "
                f"found {self.total_steps}"
            )
        return self

    @model_validator(mode="after")
    def _moments_can_move(self) -> OptimizerOptions:
        if self.moments == "bfloat16" and self.betas[1] > 0.99:
            raise ValueError(
                f"moments bfloat16 with betas[1] = {self.betas[1]}: a step changes the second moment by less than BF16 "
                "resolves (1 in 256), so it would stand still; use at most 0.99, or moments: float32"
            )
        return self


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """The rate of optimizer step `step` (the first is 0): linear warm-up that reaches lr at step warmup_steps - 1,
    then constant, or falling linearly or by a half cosine to min_lr_ratio * lr at step total_steps - 1 and after."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    assert options.total_steps is not None
    last = max(1, options.total_steps - 1 - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / last)
    falling = 1 - progress if options.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * falling)


EPS = 1e-8  # of AdamW; no run that this project follows publishes another
MUON_MOMENTUM = 0.95
NOT_MUON = {"embed", "head", "embed_tokens", "lm_head", "wte", "wpe"}  # parts of the names of embeddings and heads


class GradientError(RuntimeError):
    """The gradient is not finite. Nothing was updated."""


@dataclass
class _State:
    """Of one parameter. `master` is the parameter itself where that is float32, and int16 where it is what a BF16
    parameter lacks (trainer.masters). `moments` are exp_avg and exp_avg_sq, or momentum alone; none before the first
    gradient."""

    master: Tensor
    moments: dict[str, Tensor]
    step: int = 0


def shard_groups(name: str, parameter: Tensor) -> Sequence[dist.ProcessGroup]:
    """The process groups over which a parameter is split: those of a DTensor's sharded mesh dimensions."""
    if not _is_shard(parameter):
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())


class Optimizer:
    """AdamW or Muon over named parameters. A parameter that is not float32 gets a float32 master, which alone is
    updated and then rounded into it (AdamW on a GPU keeps 16 bits of it beside a BF16 parameter: trainer.masters); its
    gradient is summed over micro-batches in float32 too (one micro-batch needs no sum, and no float32 copy on a GPU).
    A parameter without a gradient is left alone, decay included.

    Parameters may be DTensors (FSDP2): every rank updates its shards. `groups` names the process groups over which a
    parameter is split, for the norm; plain tensors that are (experts of this rank) need one of your own, see
    `shard_groups`. All ranks get the same norm, and so update or refuse together."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]],
        options: OptimizerOptions,
        groups: Callable[[str, Tensor], Sequence[dist.ProcessGroup]] = shard_groups,
    ):
        self.options = options
        self.steps = 0  # taken so far
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("the policy has no parameter to train")
        self._groups = {name: tuple(groups(name, p)) for name, p in self.parameters.items()}
        self._gradients: dict[str, Tensor] = {}  # of parameters with a master: this rank's shards, summed by hooks
        self._states: dict[str, _State] = {}
        device = next(iter(self.parameters.values())).device
        self._fused = device.type == "cuda"
        for name, parameter in self.parameters.items():
            self._states[name] = _State(self._make_master(parameter), {})
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(_summing(self._gradients, name))
        self._matrices = {name for name in self.parameters if options.algorithm == "muon" and self._is_matrix(name)}
        self._muon = self._make_muon() if self._matrices else None

    def _make_master(self, parameter: Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        in_halves = self._fused and self.options.algorithm == "adamw" and not _is_shard(parameter)
        if in_halves and parameter.dtype == torch.bfloat16:
            return torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False)
        return parameter.detach().float()

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return learning_rate(self.options, self.steps)

    def zero_grad(self) -> None:
        self._gradients.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Clips the gradient to `max_grad_norm`, updates, drops the gradient. Returns the norm before clipping and the
        rate used. Raises GradientError, with nothing updated, if the norm is not finite."""
        gradients = self._gradients | {
            name: _local(p.grad) for name, p in self.parameters.items() if p.grad is not None
        }
        if not gradients and not any(self._groups.values()):
            raise RuntimeError("no gradient to step on: no micro-batch was run backward since the last step")
        if not self._fused:
            gradients = {name: gradient.float() for name, gradient in gradients.items()}
        norm = self._norm(gradients)
        rate = self.learning_rate
        if self._fused and self._muon is None:
            value = self._update_fused(gradients, norm, rate)
        else:
            value = norm.item()
            if math.isfinite(value):
                self._update(gradients, value, rate)
        if not math.isfinite(value):
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            self.zero_grad()
            elsewhere = "on another rank" if any(self._groups.values()) else "none (the sum overflows)"
            raise GradientError(
                f"optimizer step {self.steps}: the gradient's norm is {value}; not finite in {len(bad)} of "
                f"{len(self.parameters)} tensors, the first: {bad[0] if bad else elsewhere}. Nothing "
                "was updated; lower the learning rate or look for log-probabilities of -inf in the batch"
            )
        for name in gradients:
            self._states[name].step += 1
        self.zero_grad()
        self.steps += 1
        return {"grad_norm": value, "lr": rate}

    # --- the gradient ------------------------------------------------------------------------------------------------

    def _norm(self, gradients: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Global norm of the gradient, over all ranks, on the device."""
        norms = dict(zip(gradients, _norms(list(gradients.values())), strict=True))
        if not any(self._groups.values()):
            return torch.linalg.vector_norm(torch.stack(list(norms.values())))
        # one sum for every set of groups, in the same order on every rank, whatever had a gradient here
        nothing = torch.zeros((), device=_local(next(iter(self.parameters.values()))).device)
        total = nothing
        for groups in dict.fromkeys(self._groups.values()):
            found = [value for name, value in norms.items() if self._groups[name] == groups]
            squares = torch.stack([nothing, *found]).square().sum()
            for group in groups:
                dist.all_reduce(squares, group=group)
            total = total + squares
        return total.sqrt()

    # --- updates -----------------------------------------------------------------------------------------------------

    def _decay(self, name: str) -> float:
        return self.options.weight_decay if self.parameters[name].ndim >= 2 else 0.0

    def _begin(self, name: str) -> _State:
        """The state of a parameter, its moments made if this is its first gradient."""
        state = self._states[name]
        if not state.moments:
            if name in self._matrices:
                state.moments = {"momentum": torch.zeros_like(state.master, requires_grad=False)}
            else:
                dtype = getattr(torch, self.options.moments)
                zeros = [torch.zeros_like(state.master, dtype=dtype, requires_grad=False) for _ in range(2)]
                state.moments = {"exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
        return state

    def _update_fused(self, gradients: dict[str, Tensor], norm: Tensor, rate: float) -> float:
        """AdamW of every parameter in one kernel each, which clips too and does nothing where the norm is not finite.
        Returns the norm."""
        from trainer.model.kernels import triton_adamw

        value = Readback(norm)  # read below while the GPU still updates
        beta1, beta2 = self.options.betas
        for name, gradient in gradients.items():
            state, parameter = self._begin(name), self.parameters[name]
            triton_adamw.adamw(
                None if state.master is parameter else _local(parameter),
                _local(state.master),
                _local(state.moments["exp_avg"]),
                _local(state.moments["exp_avg_sq"]),
                gradient.contiguous(),
                norm,
                step=state.step + 1,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                eps=EPS,
                weight_decay=self._decay(name),
                max_norm=self.options.max_grad_norm,
            )
        return value.tolist()

    def _update(self, gradients: dict[str, Tensor], norm: float, rate: float) -> None:
        gradients = {name: gradient.float() for name, gradient in gradients.items()}
        if norm > self.options.max_grad_norm:
            torch._foreach_mul_(list(gradients.values()), self.options.max_grad_norm / (norm + 1e-6))
        adamw_names = [name for name in gradients if name not in self._matrices]
        for decay in {self.options.weight_decay, 0.0}:
            self._adamw([name for name in adamw_names if self._decay(name) == decay], gradients, rate, decay)
        if self._muon is not None:
            self._step_muon(gradients, rate)
        self._round(gradients)

    def _adamw(self, names: list[str], gradients: dict[str, Tensor], rate: float, decay: float) -> None:
        """torch's own, fused where it can be. Moments that are not float32 are widened for it, one parameter at a
        time."""
        wide = self.options.moments == "float32"
        for part in [names] if wide and names else [[name] for name in names]:
            states = [self._begin(name) for name in part]
            averages = [_local(state.moments["exp_avg"]) for state in states]
            squares = [_local(state.moments["exp_avg_sq"]) for state in states]
            masters = [_local(state.master) for state in states]
            used = [t.float() for t in averages], [t.float() for t in squares]
            device = masters[0].device
            adamw(
                masters,
                [gradients[name] for name in part],
                *used,
                [],
                [torch.tensor(float(state.step), device=device) for state in states],
                fused=device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=self.options.betas[0],
                beta2=self.options.betas[1],
                lr=rate,
                weight_decay=decay,
                eps=EPS,
                maximize=False,
            )
            if not wide:
                torch._foreach_copy_(averages + squares, used[0] + used[1])

    def _is_matrix(self, name: str) -> bool:
        return self.parameters[name].ndim >= 2 and not NOT_MUON & set(name.split("."))

    def _make_muon(self) -> torch.optim.Muon:
        sharded = sorted(name for name in self._matrices if _is_shard(self.parameters[name]))
        if sharded:
            raise ValueError(
                f"algorithm muon needs whole matrices, and {len(sharded)} parameters are sharded (the first: "
                f"{sharded[0]}); use algorithm: adamw"
            )
        self._slices = {name: _slices(self._states[name].master.detach()) for name in sorted(self._matrices)}
        return torch.optim.Muon(
            [matrix for slices in self._slices.values() for matrix in slices],
            lr=self.options.lr,
            weight_decay=self.options.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )

    def _step_muon(self, gradients: dict[str, Tensor], rate: float) -> None:
        assert self._muon is not None
        for name in self._matrices & gradients.keys():
            momenta = _slices(self._begin(name).moments["momentum"])
            for matrix, gradient, momentum in zip(self._slices[name], _slices(gradients[name]), momenta, strict=True):
                matrix.grad = gradient
                self._muon.state[matrix] = {"momentum_buffer": momentum}
        for group in self._muon.param_groups:
            group["lr"] = rate
        self._muon.step()
        self._muon.zero_grad(set_to_none=True)

    def _round(self, names: Iterable[str]) -> None:
        """Masters into the parameters they stand for."""
        pairs = [(self.parameters[name], self._states[name].master) for name in names]
        pairs = [(_local(p), _local(master)) for p, master in pairs if p is not master and master.dtype != torch.int16]
        if pairs:
            torch._foreach_copy_([parameter for parameter, _ in pairs], [master for _, master in pairs])

    # --- state -------------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Makes the moments of every parameter now (zeros: nothing changes), so that `state` is complete, as a
        checkpoint that is loaded in place needs it."""
        for name in self.parameters:
            self._begin(name)

    @property
    def nbytes(self) -> int:
        """Of what is kept beside the parameters and their gradients on this rank."""
        own = [s.master for name, s in self._states.items() if s.master is not self.parameters[name]]
        moments = [tensor for s in self._states.values() for tensor in s.moments.values()]
        return sum(_local(tensor).nbytes for tensor in own + moments)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside the parameters and `steps`, as `kind/parameter` -> the live tensor (a
        DTensor where the parameter is one); `step/parameter`, a count, and a master kept in halves are copies. Moments
        appear with the first gradient."""
        tensors = {}
        for name, state in self._states.items():
            if state.master is not self.parameters[name]:
                halves = state.master.dtype == torch.int16
                tensors[f"master/{name}"] = (
                    masters.join(self.parameters[name].detach(), state.master) if halves else state.master
                )
            if state.moments:
                tensors[f"step/{name}"] = torch.tensor(float(state.step))
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in state.moments.items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Takes up what `state` returned after `steps` steps, moments in this optimizer's dtype; masters are rounded
        into the parameters again. Whole tensors are split where a parameter is a DTensor. Raises ValueError that lists
        every missing, unexpected or misshapen tensor."""
        expected = {}
        for name, state in self._states.items():
            shape = state.master.shape
            kinds = ("momentum",) if name in self._matrices else ("exp_avg", "exp_avg_sq")
            if state.master is not self.parameters[name]:
                expected[f"master/{name}"] = shape
            if any(f"{kind}/{name}" in tensors for kind in kinds):
                expected |= {f"step/{name}": torch.Size(), **{f"{kind}/{name}": shape for kind in kinds}}
        problems = [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
        problems += [f"unexpected {key}" for key in sorted(tensors.keys() - expected.keys())]
        problems += [
            f"{key} has shape {list(tensors[key].shape)}, expected {list(expected[key])}"
            for key in sorted(expected.keys() & tensors.keys())
            if tensors[key].shape != expected[key]
        ]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"the optimizer state does not fit this policy: {'; '.join(problems[:5])}{more}")
        for name, state in self._states.items():
            if f"step/{name}" not in expected:
                state.moments, state.step = {}, 0
            else:
                state.step = int(tensors[f"step/{name}"].item())
                for kind, tensor in self._begin(name).moments.items():
                    _take(tensor, tensors[f"{kind}/{name}"])
            if f"master/{name}" in expected:
                given = tensors[f"master/{name}"]
                if state.master.dtype == torch.int16:
                    weight, rest = masters.split(_local(given).to(state.master.device))
                    self.parameters[name].copy_(weight)
                    state.master.copy_(rest)
                else:
                    _take(state.master, given)
        self._round(self.parameters)
        self.steps = steps


def _summing(gradients: dict[str, Tensor], name: str) -> Callable[[Parameter], None]:
    """A hook that takes a parameter's gradient into `gradients`. It knows nothing of the optimizer: a circle through
    the parameter would keep both, and all of their memory, alive."""

    def hook(parameter: Parameter) -> None:
        gradient, parameter.grad = _local(parameter.grad), None
        summed = gradients.get(name)
        if summed is None:
            gradients[name] = gradient
        elif summed.dtype != torch.float32:
            gradients[name] = summed.float().add_(gradient)
        else:
            summed.add_(gradient)

    return hook


def _is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Where nobody imported them nothing is; that takes 2 s, and one rank needs none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of it, the same memory."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def _take(ours: Tensor, given: Tensor) -> None:
    if _is_shard(ours) and not _is_shard(given):
        from torch.distributed.tensor import distribute_tensor

        given = distribute_tensor(given.to(ours.device), ours.device_mesh, ours.placements)
    _local(ours).copy_(_local(given))


def _slices(tensor: Tensor) -> list[Float[Tensor, "out inner"]]:
    """The matrices of a stack, as views."""
    return list(tensor.reshape(-1, *tensor.shape[-2:]).unbind(0))


def _norms(tensors: list[Tensor]) -> list[Float[Tensor, ""]]:
    """Norm of each in float32, whatever their dtypes: equal ones go through one kernel."""
    found: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in tensors}:
        at = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        found |= dict(zip(at, torch._foreach_norm([tensors[i] for i in at], 2, dtype=torch.float32), strict=True))
    return [found[i] for i in range(len(tensors))]
