"""What a run will take, before it starts: memory per process, work per step, placement.

Weights are counted from the headers of the policy's safetensors files, so those figures are exact; activations and
caches are estimates and marked so.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from rlzero.config import Config

WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Policy:
    """Size of the policy in a Hugging Face folder. `active` parameters multiply each token (no embedding, and of
    the routed experts only the chosen share)."""

    parameters: int
    active: int
    hidden: int
    layers: int
    vocabulary: int
    cache_values: int  # numbers that one token leaves in the cache, all layers together


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


def read_policy(folder: str | Path) -> Policy | None:
    """The policy's size; None where the folder has no weights (yet)."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        return None
    layers = config.get("num_hidden_layers", 0)
    counts = {name: _product(shape) for name, shape in shapes.items() if not _extra_layer(name, layers)}
    routed = sum(n for name, n in counts.items() if ".experts." in name)
    experts, chosen = (
        config.get("n_routed_experts") or config.get("num_experts") or 0,
        config.get("num_experts_per_tok") or 0,
    )
    embedding = sum(n for name, n in counts.items() if "embed_tokens" in name)
    idle = routed * (1 - chosen / experts) if experts else 0
    if config.get("kv_lora_rank"):
        per_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
        size = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads") or 1, 1)
        per_layer = 2 * heads * size
    return Policy(
        parameters=sum(counts.values()),
        active=round(sum(counts.values()) - idle - embedding),
        hidden=config.get("hidden_size", 0),
        layers=layers,
        vocabulary=config.get("vocab_size", 0),
        cache_values=per_layer * layers,
    )


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
    for name, parts in (("trainer", plan.trainer), ("worker", plan.worker)):
        lines.append(f"{name:<10} {size(sum(parts.values()))}")
        lines += [f"             {size(value):>10}  {part}" for part, value in parts.items() if value]
    lines.append(f"work       {plan.step_flop:.2g} FLOP a step if every completion is as long as it may be")
    return lines


def shortage(config: Config, plan: Plan) -> str | None:
    """Why the memory of this machine cannot hold a run on it, or None. A run on a cluster is not judged."""
    if config.cluster.address is not None or config.device == "cuda":
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


def _extra_layer(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, stored behind the last one."""
    parts = name.split(".")
    return len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() and int(parts[2]) >= layers > 0


def _product(shape: list[int]) -> int:
    result = 1
    for extent in shape:
        result *= extent
    return result
