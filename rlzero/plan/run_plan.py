"""What a run will take, before it starts: memory per process, work per step, placement.

Weights are counted from the headers of the policy's safetensors files, so those figures are exact; activations and
caches are estimates and marked so. What stands on GPUs is planned in gpu_plan.py; the figures here are a CPU's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rlzero.cluster.placement import on_gpus
from rlzero.config.rl import Config
from rlzero.plan import gpu_plan
from rlzero.plan.gpu_plan import GpuPlan
from rlzero.plan.policy_size import Policy, read_policy

WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    """Bytes of one trainer and one rollout worker by part, and the arithmetic of a step."""

    policy: Policy
    trainer: dict[str, int]
    worker: dict[str, int]
    completions: int
    longest_tokens: int
    updates: int
    step_flop: float
    gpu: GpuPlan | None = None  # where the run is on GPUs


def sleep_level(config: Config) -> int:
    """What engines do while the trainer works: 0, they stay awake; 1 or 2, they give their memory back. What
    engine_args say goes first; then, on a GPU that trainer and engines share, 0 where both fit at their fullest."""
    asked = config.rollout.engine_args.get("sleep_level")
    plan = gpu_of(config) if asked is None else None
    return int(asked or 0) if plan is None else plan.sleep_level


def engine_options(config: Config, kind: str) -> dict[str, Any]:
    """What an engine of `kind` is started with by plan: its context and the size of its cache."""
    plan = gpu_of(config) if kind == "vllm" else None
    return {} if plan is None else gpu_plan.engine_options(config, plan, read_policy(config.policy.path or ""))


def gpu_of(config: Config) -> GpuPlan | None:
    """None on a CPU, and where the policy's weights are not there (yet)."""
    policy = read_policy(config.policy.path or "") if on_gpus(config) else None
    return None if policy is None else gpu_plan.make_gpu_plan(config, policy)


def make_plan(config: Config) -> Plan | None:
    """What `config` takes; None where its policy's weights are not there (yet)."""
    policy = read_policy(config.policy.path or "")
    if policy is None:
        return None
    width = WIDTH[config.policy.dtype]
    n = policy.parameters
    trainer = {
        "weights": n * width,
        "master weights (FP32)": n * 4 if width < 4 else 0,
        "gradients (FP32)": n * 4,
        "optimizer moments (FP32)": n * 8,
        "reference weights": n * width if config.loss.kl_coef > 0 else 0,
        "activations of one micro-batch, about": _activations(config, policy, width),
    }
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    completions = config.batch.prompts * config.batch.group_size
    here = -(-completions // config.rollout.workers)
    worker = {
        "weights": n * width,
        # An engine takes requests as its cache allows; this is what it would take to write all of them at once.
        "cache of all completions at full length, at most": here * longest * policy.cache_values * width,
    }
    # Forward 2, backward 4 per parameter and token; log-probabilities of the step's start and of the reference 2 each.
    passes = 6 + 2 * (config.batch.minibatches > 1) + 2 * (config.loss.kl_coef > 0)
    tokens = completions * longest
    return Plan(
        policy=policy,
        trainer=trainer,
        worker=worker,
        completions=completions,
        longest_tokens=longest,
        updates=config.steps * config.batch.minibatches,
        step_flop=float((passes + 2) * policy.active * tokens),
        gpu=gpu_plan.make_gpu_plan(config, policy) if on_gpus(config) else None,
    )


def describe(config: Config, plan: Plan | None, placement: list[str]) -> list[str]:
    """The plan as lines of text: batch, memory, and the lines of the placement between them."""
    batch = config.batch
    lines = [
        f"step       {batch.prompts} prompts x {batch.group_size} = {batch.prompts * batch.group_size} completions of "
        f"up to {config.rollout.max_tokens} tokens, {batch.minibatches} updates; staleness {config.staleness}",
        f"run        {config.steps} steps, {config.steps * batch.minibatches} updates, into {config.run_dir}",
        *placement,
    ]
    if plan is None:
        return [*lines, f"memory     unknown: {config.policy.path} holds no weights (yet)"]
    policy = plan.policy
    lines.append(f"policy     {count(policy.parameters)} parameters, {count(policy.active)} work on a token")
    if plan.gpu is not None:
        lines += describe_gpu(plan.gpu)
    else:
        for name, parts in (("trainer", plan.trainer), ("worker", plan.worker)):
            lines += _table(name, parts)
    lines.append(f"work       {plan.step_flop:.2g} FLOP a step if every completion is as long as it may be")
    return lines


def describe_gpu(plan: GpuPlan) -> list[str]:
    """What stands on each GPU, part by part, and whether together or in turn."""
    device, at_once = plan.device, "together" if not plan.sleep_level else "in turn"
    found = "" if device.found else ", assumed: this machine has no GPU"
    lines = [f"GPU        {device.name}, {size(device.nbytes)}{found}; {size(plan.room)} of it are planned with"]
    if plan.shared:
        engines = f"{plan.engines} engine(s)"
        lines.append(
            f"memory     trainer and {engines} {at_once} on each: {size(plan.training)} while the trainer works, "
            f"{size(plan.writing)} while the engine does"
        )
        if plan.sleep_level:
            lines.append(
                f"           engines sleep at level {plan.sleep_level} while the trainer works and then hold "
                f"{size(plan.engine.at_rest)} each; the trainer at rest holds {size(plan.trainer.at_rest)}"
            )
    else:
        lines.append(f"memory     apart: {size(plan.training)} on a trainer's GPU, {size(plan.writing)} on an engine's")
    if not plan.lacking and plan.needed > plan.room:
        lines.append(f"           {size(plan.needed - plan.room)} over what is planned with: it may run out of memory")
    lines += _table("trainer", plan.trainer.parts) + _table("engine", plan.engine.parts)
    if 0 < plan.cache_bytes < plan.full_cache_bytes:
        lines.append(
            f"           a cache of {size(plan.full_cache_bytes)} would hold all that a worker writes at full length; "
            "with less, the engine may write fewer at a time"
        )
    return lines


def _table(name: str, parts: dict[str, int]) -> list[str]:
    lines = [f"{name:<10} {size(sum(parts.values()))}"]
    return lines + [f"             {size(value):>10}  {part}" for part, value in parts.items() if value]


def shortage(config: Config, plan: Plan) -> str | None:
    """Why memory cannot hold the run, or None: that of a GPU, or of this machine for a run on it alone."""
    if plan.gpu is not None:
        return shortage_of_gpu(config, plan.gpu)
    if config.cluster.address is not None:
        return None
    exact = (
        sum(v for k, v in plan.trainer.items() if "about" not in k) + plan.worker["weights"] * config.rollout.workers
    )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if exact <= there:
        return None
    return (
        f"the run needs at least {size(exact)} for weights, gradients and optimizer, and this machine has "
        f"{size(there)} of memory; use a smaller policy, or a cluster (cluster.address)"
    )


def shortage_of_gpu(config: Config, plan: GpuPlan) -> str | None:
    """Why a GPU cannot hold its part of the run, by how much and what helps; None where it can."""
    if not plan.lacking:
        return None
    trainer = plan.training >= plan.writing
    who = "the trainer works" if trainer else "engines write"
    ways = ["batch.tokens_per_micro_batch lower"] if trainer or not plan.sleep_level else []
    if config.policy.activation_checkpointing is not True:
        ways.append(
            "policy.activation_checkpointing: "
            + ("true" if config.policy.activation_checkpointing else "selective or true")
        )
    if config.optimizer.moments == "float32":
        ways.append("optimizer.moments: bfloat16")
    if plan.shared:
        ways.append("engines on GPUs of their own")
        if plan.sleep_level == 0:
            ways.append("staleness: 0, so that engines can sleep" if config.staleness else "engine_args.sleep_level: 2")
    if not trainer:
        ways.append("a smaller rollout.max_tokens or engine_args.max_batch")
    ways.append("more trainer ranks (parallel.dp), which share out weights and optimizer")
    return (
        f"a GPU would hold {size(plan.needed)} while {who} (trainer {size(plan.trainer.peak)}, engine "
        f"{size(plan.engine.peak)}) and has {size(plan.device.nbytes)} ({plan.device.name}): {size(plan.lacking)} too "
        f"much. What helps: {'; '.join(ways)}"
    )


def count(number: float) -> str:
    """Parameters in words: 5.3 M, 671 B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return str(int(number))


def size(number: float) -> str:
    for limit, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if number >= limit:
            return f"{number / limit:.3g} {suffix}"
    return f"{number / 1024:.3g} KiB"


def _activations(config: Config, policy: Policy, width: int) -> int:
    """A rough count: about 18 values of the hidden width per token and layer are kept for the backward pass (2 with
    checkpointing), and one chunk of FP32 logits."""
    tokens = config.batch.tokens_per_micro_batch
    kept = 2 if config.policy.activation_checkpointing else 18
    logits = min(tokens, 4096) * policy.vocabulary * 4 * 2
    return tokens * policy.hidden * policy.layers * kept * width + logits
