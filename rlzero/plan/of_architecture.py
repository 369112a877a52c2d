"""What training an architecture takes, before there are weights: parameters, memory per GPU, time per step.

A model config is `policy` (with `init`), `parallel` and `optimizer`, the sections that every other config has too, and
`work`. Parameters are counted on torch's meta device, tensor by tensor, so weights, gradients and optimizer states are
exact for the placement; memory is counted by memory.py as for a run. Time is arithmetic at the measured rates of
rates.py over an openly assumed efficiency; communication, norms, routers, optimizer and gaps are in that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from rlzero.config.read import UsageError, read_config
from rlzero.config.rl import Positive, _Section
from rlzero.plan import rates
from rlzero.plan.memory import BF16, FP32, Held, TrainerWork, count, recompute_of, size, trainer_memory
from rlzero.plan.size import LayerSize, PolicySize, size_of_architecture
from trainer.optimizer import OptimizerOptions
from trainer.parallel.ranks import ParallelOptions
from trainer.policy import PolicyOptions

if TYPE_CHECKING:
    from trainer.model.v3_config import V3Config


class Work(_Section):
    """An optimizer step over all GPUs; a micro-batch is one data-parallel rank's."""

    tokens_per_step: Positive = 1_048_576
    tokens_per_micro_batch: Positive = 16_384
    sequence_tokens: Positive = 4096
    memory_gib: float = Field(79.1, gt=0)  # of one GPU; torch finds this much on an H100 80GB
    efficiency: float = Field(rates.EFFICIENCY, gt=0, le=1)  # share of the time spent in the kernels that are counted


class ModelConfig(_Section):
    """An architecture and the GPUs that train it, for `rlzero plan`."""

    name: str
    policy: PolicyOptions
    parallel: ParallelOptions = ParallelOptions()
    work: Work = Work()
    optimizer: OptimizerOptions = OptimizerOptions(moments="bfloat16")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
        """Raises `ConfigError` with every mistake found."""
        return read_config(cls, path, overrides, _conflicts)

    @cached_property
    def architecture(self) -> V3Config:
        from trainer.model.v3_config import V3Config

        if self.policy.init is None:
            return V3Config.load(self.policy.path or "")
        return V3Config.from_hf({"model_type": "deepseek_v3", **self.policy.init})

    @property
    def micro_batches(self) -> int:
        """Of one data-parallel rank in a step."""
        return self.work.tokens_per_step // (self.parallel.dp * self.work.tokens_per_micro_batch)


def is_model_config(path: str | Path) -> bool:
    """Whether a YAML file is one of these, by its sections."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        return False  # whoever reads it next says what is wrong
    return isinstance(tree, dict) and "work" in tree and "policy" in tree


def _conflicts(config: ModelConfig):
    ranks, work = config.parallel, config.work
    try:
        model = config.architecture
    except (ValueError, OSError) as error:
        yield ("policy",), f"policy: {error}"
        return
    if ranks.pp > model.num_hidden_layers:
        yield ("parallel.pp",), f"parallel.pp: {ranks.pp} stages for {model.num_hidden_layers} layers"
    if ranks.ep > 1 and model.n_routed_experts % ranks.ep:
        text = f"parallel.ep: {ranks.ep} ranks cannot share out {model.n_routed_experts} routed experts evenly"
        yield ("parallel.ep",), text
    unit = ranks.dp * work.tokens_per_micro_batch
    if work.tokens_per_step % unit:
        text = (
            f"work.tokens_per_step: {work.tokens_per_step} is no multiple of {ranks.dp} ranks x "
            f"{work.tokens_per_micro_batch} tokens = {unit}"
        )
        yield ("work.tokens_per_step", "work.tokens_per_micro_batch"), text
    if work.sequence_tokens > work.tokens_per_micro_batch:
        yield ("work.sequence_tokens",), "work.sequence_tokens: longer than work.tokens_per_micro_batch"


# ---- placing ----


@dataclass(frozen=True)
class Part:
    """An embedding, a layer or a head, as stages are cut from them: its forward FLOP of a token, by kernel."""

    name: str
    forward_flop: dict[str, float]
    layer: LayerSize | None = None


def parts_of(model: V3Config, policy: PolicySize, sequence_tokens: int) -> list[Part]:
    """In the order of the computation: embedding, layers, head, layers of multi-token prediction. A causal token sees
    half of its sequence on average; attention takes 2 FLOP for each of q k and p v."""
    head = {"head": 2.0 * model.vocab_size * model.hidden_size}
    share = model.num_experts_per_tok / max(model.n_routed_experts, 1)
    attention = float(sequence_tokens * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim))

    def part(index: int, layer: LayerSize, more: dict[str, float]) -> Part:
        flop = {"linear": 2.0 * layer.quantized, "grouped": 2 * layer.routed * share, "attention": attention}
        return Part(f"layers.{index}", flop | more, layer)

    layers = [part(i, layer, {}) for i, layer in enumerate(policy.by_layer)]
    extra = [part(policy.layers + i, layer, head) for i, layer in enumerate(policy.mtp_layers)]
    return [Part("embedding", {}), *layers, Part("head", head), *extra]


def stages(parts: Sequence[Part], pipeline: int, cost: Sequence[float]) -> list[list[Part]]:
    """Contiguous stages, none empty, whose dearest is as cheap as it can be."""
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for stage in range(1, pipeline + 1):
        for end in range(stage, len(parts) + 1):
            choices = [
                (max(best[stage - 1, start][0], sum(cost[start:end])), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            ]
            if choices:
                best[stage, end] = min(choices)
    ends = [len(parts)]
    for stage in range(pipeline, 0, -1):
        ends.append(best[stage, ends[-1]][1])
    ends.reverse()
    return [list(parts[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


@dataclass(frozen=True)
class ModelPlan:
    """`memory` is the fullest GPU's; times are seconds of the slowest stage."""

    policy: PolicySize
    folder_bytes: dict[str, int]  # of a Hugging Face folder, by format
    memory: Held
    stage: int  # the fullest
    kernel_s: dict[str, float]  # of one micro-batch, forward and backward, all stages
    slowest_stage_s: float  # of one micro-batch
    bubble: float  # share of a step that a stage waits for the first and the last micro-batch
    step_s: float
    model_flop: float  # of a step, forward and backward, nothing counted twice


def make_model_plan(config: ModelConfig) -> ModelPlan:
    """Memory and time of `config`."""
    ranks, work = config.parallel, config.work
    policy, folders = size_of_architecture(config.architecture)
    parts = parts_of(config.architecture, policy, work.sequence_tokens)
    tokens, again = work.tokens_per_micro_batch, float(config.policy.activation_checkpointing is True)
    recipe = "fp8" if config.policy.recipe == "fp8" else "bf16"
    seconds = [{k: _kernel_s(k, flop * tokens, recipe, again) for k, flop in p.forward_flop.items()} for p in parts]
    by_part = {part.name: sum(s.values()) for part, s in zip(parts, seconds, strict=True)}
    cut = stages(parts, ranks.pp, list(by_part.values()))
    slowest = max(sum(by_part[part.name] for part in stage) for stage in cut) / work.efficiency
    turns = config.micro_batches + ranks.pp - 1
    memory = [stage_memory(config, stage, i) for i, stage in enumerate(cut)]
    fullest = max(range(len(cut)), key=lambda i: memory[i].peak)
    return ModelPlan(
        policy=policy,
        folder_bytes=folders,
        memory=memory[fullest],
        stage=fullest,
        kernel_s={k: sum(s.get(k, 0.0) for s in seconds) for k in ("linear", "grouped", "attention", "head")},
        slowest_stage_s=slowest,
        bubble=(ranks.pp - 1) / turns,
        step_s=slowest * turns,
        model_flop=3 * sum(sum(part.forward_flop.values()) for part in parts) * work.tokens_per_step,
    )


def _kernel_s(kernel: str, forward_flop: float, recipe: str, again: float) -> float:
    """Of one GPU for a micro-batch, forward and backward; `again` is the share of the forward that runs twice."""
    if kernel == "attention":
        return rates.attention_seconds(forward_flop, again)
    if kernel == "head":
        return rates.LINEAR["bf16"].seconds(forward_flop)
    return (rates.GROUPED if kernel == "grouped" else rates.LINEAR)[recipe].seconds(forward_flop, again)


def stage_memory(config: ModelConfig, stage: Sequence[Part], index: int) -> Held:
    """Of a GPU of pipeline stage `index`. 1F1B: the first stage runs ahead the furthest."""
    ranks, policy = config.parallel, config.policy
    work = TrainerWork(
        tokens=config.work.tokens_per_micro_batch,
        micro_batches=config.micro_batches,
        recompute=recompute_of(policy.activation_checkpointing),
        width=BF16 if policy.dtype == "bfloat16" else FP32,
        moments=BF16 if config.optimizer.moments == "bfloat16" else FP32,
        master=BF16 if config.optimizer.algorithm == "adamw" else FP32,
        dp=ranks.dp,
        ep=ranks.ep,
        reshard=ranks.reshard,
        reduce_each=ranks.reduce_each,
        fp8=policy.recipe == "fp8",
        first=index == 0,
        last=index == ranks.pp - 1,
        in_flight=min(config.micro_batches, ranks.pp - index),
    )
    return trainer_memory(config.architecture, [part.layer for part in stage if part.layer is not None], work)


# ---- words ----


def describe_model(config: ModelConfig, plan: ModelPlan) -> list[str]:
    """The plan as lines of text."""
    policy, ranks, work = plan.policy, config.parallel, config.work
    lines = [
        f"model      {config.name}: {count(policy.parameters)} parameters ({policy.parameters:,}), "
        f"{count(policy.active)} work on a token ({policy.active:,}, without the embedding)"
    ]
    if policy.mtp:
        lines.append(
            f"           MTP: {count(policy.mtp)} more ({policy.mtp:,}); {count(policy.mtp_in_folder)} in a folder, "
            "which repeats embedding and head"
        )
    lines.append(
        f"folder     {size(plan.folder_bytes['bf16'])} in BF16, {size(plan.folder_bytes['fp8'])} in block-FP8"
    )
    lines.append(
        f"parallel   {ranks.ranks} GPUs: {ranks.pp} pipeline stage(s) x {ranks.dp} data-parallel ranks, experts over "
        f"{ranks.ep}, recompute {recompute_of(config.policy.activation_checkpointing)}, recipe {config.policy.recipe}"
    )
    fits = "fits" if plan.memory.peak <= work.memory_gib * 2**30 else "DOES NOT FIT"
    where = f"the fullest GPU (stage {plan.stage + 1})" if ranks.pp > 1 else "every GPU"
    lines.append(f"memory     {size(plan.memory.peak)} on {where}: {fits} in {work.memory_gib:g} GiB")
    lines += plan.memory.lines()
    lines.append(
        f"step       {work.tokens_per_step:,} tokens: {config.micro_batches} micro-batches of "
        f"{work.tokens_per_micro_batch:,} on every rank, sequences of {work.sequence_tokens:,}"
    )
    per_gpu = plan.model_flop / plan.step_s / ranks.ranks
    hours = plan.step_s * ranks.ranks / 3600 / work.tokens_per_step * 1e12
    lines.append(
        f"time       {_seconds(plan.step_s)} a step, {work.tokens_per_step / plan.step_s:,.0f} tokens/s, "
        f"{per_gpu / rates.TERA:.0f} TFLOP/s a GPU ({per_gpu / rates.H100_BF16_FLOPS:.0%} of an H100's dense BF16), "
        f"{hours / 1e3:.3g} K GPU hours per trillion tokens"
    )
    everything = sum(plan.kernel_s.values())
    shares = ", ".join(f"{name} {value / everything:.0%}" for name, value in plan.kernel_s.items())
    lines.append(
        f"           kernels at measured rates (plan/rates.py): {shares}. Assumed: they take {work.efficiency:.0%} "
        f"of the time, the rest is communication, norms, routers, optimizer. Pipeline bubble: {plan.bubble:.0%}"
    )
    return lines


def shortage_of_memory(config: ModelConfig, plan: ModelPlan) -> UsageError | None:
    """The error to raise where a GPU cannot hold its part, or None."""
    if plan.memory.peak <= config.work.memory_gib * 2**30:
        return None
    return UsageError(
        f"a GPU would need {size(plan.memory.peak)} and has {config.work.memory_gib:g} GiB: raise parallel.dp, "
        "parallel.pp or parallel.ep, set parallel.reshard or parallel.reduce_each, or recompute more "
        "(policy.activation_checkpointing)"
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def plan_text(path: str | Path, overrides: Sequence[str]) -> tuple[list[str], Any]:
    """Lines to print, and what is short (an exception, or None)."""
    config = ModelConfig.load(path, overrides)
    plan = make_model_plan(config)
    return describe_model(config, plan), shortage_of_memory(config, plan)
