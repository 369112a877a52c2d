"""AdamW with FP32 master weights and gradients, learning-rate schedules, global-norm clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


class OptimizerOptions(BaseModel):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and its schedule; defaults: R1-Zero's lr (arXiv 2501.12948),
    betas and clipping of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(3e-6, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    total_steps: int | None = Field(None, gt=0)  # optimizer steps at whose end min_lr_ratio is reached
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)  # matrices only: no norms, no biases
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    router_bias_gamma: float = Field(0.0, ge=0)  # a router's bias moves by this after a step (section 2.1.2); 0: never

    @model_validator(mode="after")
    def _decay_needs_an_end(self) -> OptimizerOptions:
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule {self.schedule} needs total_steps above warmup_steps ({self.warmup_steps}), "
                f"found {self.total_steps}"
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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class GradientError(RuntimeError):
    """The gradient is not finite. Nothing was updated."""


class Optimizer:
    """AdamW over named parameters. A parameter that is not float32 gets a float32 master, which alone is updated and
    then rounded into it; its gradient is summed over micro-batches in float32 too. Holds per parameter
    `master` (where there is one) and AdamW's `step`, `exp_avg` and `exp_avg_sq`. A parameter without a gradient is
    left alone, decay included."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], options: OptimizerOptions):
        self.options = options
        self.steps = 0  # taken so far
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if not self.parameters:
            raise ValueError("the policy has no parameter to train")
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self._masters[name] = parameter
                continue
            master = parameter.detach().float()
            self._masters[name] = master
            parameter.register_post_accumulate_grad_hook(_sum_into(master))
        decay = [t for t in self._masters.values() if t.ndim >= 2]
        no_decay = [t for t in self._masters.values() if t.ndim < 2]
        groups = [
            {"params": tensors, "weight_decay": weight_decay}
            for tensors, weight_decay in ((decay, options.weight_decay), (no_decay, 0.0))
            if tensors
        ]
        device = next(iter(self._masters.values())).device
        self._adamw = torch.optim.AdamW(
            groups,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=device.type in ("cpu", "cuda"),
        )

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return learning_rate(self.options, self.steps)

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Clips the gradient to `max_grad_norm`, updates, drops the gradient. Returns the norm before clipping and the
        rate used. Raises GradientError, with nothing updated, if the norm is not finite."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        if not gradients:
            raise RuntimeError("no gradient to step on: no micro-batch was run backward since the last step")
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        value = norm.item()
        if not math.isfinite(value):
            bad = [n for n, m in self._masters.items() if m.grad is not None and not m.grad.isfinite().all()]
            self.zero_grad()
            raise GradientError(
                f"optimizer step {self.steps}: the gradient's norm is {value}; not finite in {len(bad)} of "
                f"{len(self._masters)} tensors, the first: {bad[0] if bad else 'none (the sum overflows)'}. Nothing "
                "was updated; lower the learning rate or look for log-probabilities of -inf in the batch"
            )
        if value > self.options.max_grad_norm:
            torch._foreach_mul_(gradients, self.options.max_grad_norm / (value + 1e-6))
        rate = self.learning_rate
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.zero_grad()
        self._round()
        self.steps += 1
        return {"grad_norm": value, "lr": rate}

    def _round(self) -> None:
        """Masters into the parameters they stand for."""
        rounded = [(p, self._masters[name]) for name, p in self.parameters.items() if self._masters[name] is not p]
        if rounded:
            torch._foreach_copy_([p.data for p, _ in rounded], [master for _, master in rounded])

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside the parameters and `steps`, as `kind/parameter` -> the live tensor."""
        tensors = {}
        for name, master in self._masters.items():
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master
            moments = self._adamw.state.get(master, {})  # empty until the first gradient
            tensors |= {f"{kind}/{name}": moments[kind] for kind in MOMENTS if kind in moments}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Takes up what `state` returned after `steps` steps; masters are rounded into the parameters again. Raises
        ValueError that lists every missing, unexpected or misshapen tensor."""
        begun = {key.partition("/")[2] for key in tensors if key.startswith("exp_avg/")} & self._masters.keys()
        expected = {f"master/{n}": m.shape for n, m in self._masters.items() if m is not self.parameters[n]}
        for name in begun:
            shape = self._masters[name].shape
            expected |= {f"step/{name}": torch.Size(), f"exp_avg/{name}": shape, f"exp_avg_sq/{name}": shape}
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
        self._adamw.state.clear()
        for name, master in self._masters.items():
            if f"master/{name}" in expected:
                master.copy_(tensors[f"master/{name}"])
            if name in begun:
                # float32 on the master's device: what the fused kernel works on
                self._adamw.state[master] = {
                    kind: tensors[f"{kind}/{name}"].to(master.device, torch.float32, copy=True) for kind in MOMENTS
                }
        self._round()
        self.steps = steps


def _sum_into(master: Tensor):
    def hook(parameter: torch.nn.Parameter) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
