"""What a run will take, before it starts: memory of each process, work of a step, and on GPUs what stands where.

Weights are counted from the headers of the policy's safetensors files and the rest by memory.py. Where trainer and
engines share GPUs they stay there together if both fit at their fullest. Otherwise they take turns: engines sleep
(level 2, the cheapest on one H100: 0.05 s for a cycle of 1.5 GB, level 1 twice that, see benchmarks/RESULTS.md) while
the trainer works. vLLM is told how large its cache shall be, so nothing depends on which process came first.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlzero.cluster import placement
from rlzero.config.rl import Config
from rlzero.data.prompts import load_tokenizer
from rlzero.plan.memory import (
    BF16,
    FP32,
    MARGIN_SHARE,
    EngineWork,
    Held,
    TrainerWork,
    cache_for,
    count,
    engine_memory,
    recompute_of,
    size,
    sync_buffers,
    trainer_memory,
)
from rlzero.plan.size import PolicySize, read_size
from rollout.tokenizer import FILES as TOKENIZER_FILES
from trainer.checkpoint.model_folder import model_fields, position_limit, rotation_note, text_end

GIB = 1 << 30
ASSUMED, ASSUMED_BYTES = "H100 80GB", int(79.1 * GIB)  # torch finds this much on one
SLEEP_LEVEL = 2
MAX_BATCH = 256  # requests at a time of rollout.vllm.engine, where engine_args do not say
LEAST_CONTEXT = 64  # tokens; the probe's sequences must fit too


@dataclass(frozen=True)
class Device:
    """What memory is planned for: a GPU, or the memory of this machine."""

    name: str
    nbytes: int
    found: bool = True  # on this machine; else assumed
    cuda: bool = True

    @property
    def room(self) -> int:
        """What is planned with: a GPU less a margin for what an estimate may be wrong by."""
        return round(self.nbytes * (1 - MARGIN_SHARE)) if self.cuda else self.nbytes


@dataclass(frozen=True)
class RunPlan:
    """`engines` stand on the GPU of each trainer rank (`shared`), or each has its own. On a CPU all stand in one
    machine's memory, and the parts named "about" or "at most" are not planned with."""

    policy: PolicySize
    device: Device
    trainer: Held
    engine: Held
    shared: bool
    engines: int
    sleep_level: int
    cache_bytes: int
    full_cache_bytes: int  # for all completions that an engine writes at a time, at full length
    step_flop: float

    @property
    def needed(self) -> int:
        """Bytes on the fullest GPU at its fullest moment."""
        return max(self.training, self.writing)

    @property
    def on_trainer(self) -> int:
        """Bytes on a trainer's GPU at its fullest moment."""
        return self.needed if self.shared else self.training

    @property
    def lacking(self) -> int:
        """Bytes that are needed and that the device does not have, its margin counted in; 0 where the run fits."""
        return max(0, self.needed - self.device.nbytes)

    @property
    def training(self) -> int:
        """Bytes on a trainer's GPU while it works."""
        if not self.device.cuda:
            return self.trainer.exact + self._engines(self.engine.exact)
        return self.trainer.peak + self._engines(self.engine.at_rest if self.sleep_level else self.engine.peak)

    @property
    def writing(self) -> int:
        """Bytes on an engine's GPU while it works."""
        if not self.device.cuda:
            return self.training
        if not self.shared:
            return self.engine.peak
        # A trainer that never gave memory back still holds its fullest moment's.
        return self._engines(self.engine.peak) + (self.trainer.at_rest if self.sleep_level else self.trainer.peak)

    def _engines(self, each: int) -> int:
        return self.engines * each if self.shared else 0


def find_device(cuda: bool = True) -> Device:
    """This machine's first GPU, or the one that plans are made for where there is none; its memory for runs on CPUs."""
    import torch

    if not cuda:
        return Device("this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), cuda=False)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Device(found.name, found.total_memory)
    return Device(ASSUMED, ASSUMED_BYTES, found=False)


def make_plan(config: Config, device: Device | None = None) -> RunPlan | None:
    """What `config` takes of `device` (None: what this machine has); None where its policy's weights are not there
    (yet)."""
    policy = read_size(config.policy.path or "")
    if policy is None:
        return None
    cuda = placement.on_gpus(config)
    device = device or find_device(cuda)
    completions = config.batch.prompts * config.batch.group_size
    # Forward 2, backward 4 per parameter and token; log-probabilities of the step's start and of the reference 2 each,
    # and the engine's 2.
    passes = 8 + 2 * (config.batch.minibatches > 1) + 2 * (config.loss.kl_coef > 0)
    flop = float(passes * policy.active * completions * _longest(config))
    trainer, token_bytes = _trainer(config, policy, cuda), _width(config) * policy.cache_values
    if not cuda:
        weights = _width(config) * policy.parameters
        cache = -(-completions // config.rollout.workers) * _longest(config) * token_bytes
        # An engine takes requests as its cache allows; this is what it would take to write all of them at once.
        engine = Held({"weights": weights, "cache of all completions at full length, at most": cache}, weights)
        here = config.cluster.address is None
        return RunPlan(policy, device, trainer, engine, here, config.rollout.workers, 0, cache, cache, flop)
    if config.rollout.engine == "torch":  # it writes on the CPU
        return RunPlan(policy, device, trainer, Held(), False, 0, 0, 0, 0, flop)
    engines = _on_gpus(config, policy, device, trainer, token_bytes)
    return RunPlan(policy, device, trainer, *engines, flop)


def _on_gpus(
    config: Config, policy: PolicySize, device: Device, trainer: Held, token_bytes: int
) -> tuple[Held, bool, int, int, int, int]:
    """An engine's memory and how it stands beside the trainer: the fields of RunPlan from `engine` on."""
    asked, ranks = config.rollout.engine_args, config.parallel
    shared = placement.plan(config).shares_gpus
    engines = -(-config.rollout.workers // ranks.dp) if shared else 1
    work = engine_work(config, policy)
    completions = -(-config.batch.prompts * config.batch.group_size // config.rollout.workers)
    least = cache_for(1, context(config), token_bytes)
    full = max(least, cache_for(min(completions, work.running), work.longest, token_bytes))
    bare = engine_memory(work, 0)

    def cache_beside(trainer_bytes: int) -> int:
        """The largest cache for which there is room, at most a full one; less than `least` where there is none."""
        if given := asked.get("kv_cache_memory_bytes"):
            return int(given)
        if share := asked.get("gpu_memory_utilization"):  # vLLM fills up what it is given
            return int(share * device.nbytes) - bare.peak
        return min(full, (device.room - trainer_bytes) // engines - bare.peak)

    level = asked.get("sleep_level")
    cache = cache_beside(trainer.peak if shared else 0)
    if not shared:
        level = level or 0
    elif level is None:
        fits = cache >= min(full, int(asked.get("kv_cache_memory_bytes", full))) and (
            trainer.peak + engines * engine_memory(work, cache).peak <= device.room
        )
        level = 0 if fits or config.staleness else SLEEP_LEVEL  # engines that write all the time cannot sleep
    if shared and level:
        cache = cache_beside(trainer.at_rest)
    cache = max(cache, least)
    return engine_memory(work, cache), shared, engines, level, cache, full


def _trainer(config: Config, policy: PolicySize, cuda: bool) -> Held:
    ranks, batch = config.parallel, config.batch
    update = -(-batch.prompts * batch.group_size // batch.minibatches) * _longest(config)  # if all are that long
    tokens = min(batch.tokens_per_micro_batch, update)
    work = TrainerWork(
        tokens=tokens,
        micro_batches=-(-update // (tokens * ranks.dp)),
        recompute=recompute_of(config.policy.activation_checkpointing),
        width=_width(config),
        moments=BF16 if config.optimizer.moments == "bfloat16" else FP32,
        master=BF16 if config.optimizer.algorithm == "adamw" else FP32,
        reference=config.loss.kl_coef > 0,
        dp=ranks.dp,
        ep=ranks.ep,
        reshard=ranks.reshard,
        reduce_each=ranks.reduce_each,
        nccl=cuda and _by_nccl(config),
        fp8=config.policy.recipe == "fp8",
        cuda=cuda,
    )
    buffers = _buffers(config, policy) if cuda else 0
    return trainer_memory(architecture(policy), policy.by_layer, work, policy.mtp, buffers)


def _longest(config: Config) -> int:
    """Tokens of prompt and completion."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


def _buffers(config: Config, policy: PolicySize) -> int:
    """What the weight sync packs into on either side of it. Weights of several ranks go through the CPU."""
    on_device = placement.plan(config).choice.transport in ("ipc", "nccl") and config.parallel.ranks == 1
    return sync_buffers(_width(config) * policy.parameters) if on_device else 0


def _by_nccl(config: Config) -> bool:
    return placement.plan(config).choice.transport == "nccl" and config.parallel.ranks == 1


def _width(config: Config) -> int:
    return BF16 if config.policy.dtype == "bfloat16" else FP32


def architecture(policy: PolicySize) -> Any:
    """The policy's V3Config; for another architecture, one whose layers keep about as much."""
    from trainer.model.v3_config import V3Config

    fields = policy.fields
    if fields.get("model_type") == "deepseek_v3":
        return V3Config.from_hf(fields)
    heads = fields.get("num_attention_heads") or 1
    size = fields.get("head_dim") or policy.hidden // heads
    return V3Config(
        vocab_size=policy.vocabulary, hidden_size=policy.hidden,
        intermediate_size=fields.get("intermediate_size") or 4 * policy.hidden,
        moe_intermediate_size=fields.get("moe_intermediate_size") or policy.hidden,
        num_hidden_layers=policy.layers, num_attention_heads=heads,
        n_routed_experts=fields.get("num_experts") or 1, num_experts_per_tok=fields.get("num_experts_per_tok") or 1,
        first_k_dense_replace=policy.layers, kv_lora_rank=size, qk_nope_head_dim=size // 2 * 2, qk_rope_head_dim=2,
        v_head_dim=size, n_shared_experts=0, tie_word_embeddings=bool(fields.get("tie_word_embeddings")),
    )  # fmt: skip


def context(config: Config) -> int:
    """Tokens that an engine must be able to hold of one request: the run's longest sequence."""
    if asked := config.rollout.engine_args.get("max_context"):
        return int(asked)
    longest = max(_longest(config), LEAST_CONTEXT)
    return min(longest, position_limit(model_fields(config.policy.path)) or longest)


def engine_work(config: Config, policy: PolicySize) -> EngineWork:
    """What an engine does at its fullest, as engine_args say or vLLM's defaults."""
    asked, m = config.rollout.engine_args, architecture(policy)
    width = _width(config)
    latent = policy.fields.get("kv_lora_rank") or 0
    absorbed = policy.layers * latent * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
    chosen = m.num_experts_per_tok if m.moe_layers else 0
    wide = max(
        chosen * (m.hidden_size + 3 * m.moe_intermediate_size),
        3 * m.intermediate_size,
        m.num_attention_heads * (3 * m.qk_head_dim + 2 * m.v_head_dim),
    )
    graphs = (asked.get("compilation_config") or {}).get("cudagraph_capture_sizes")
    return EngineWork(
        weight_bytes=width * policy.parameters // placement.engine_gpus(config),
        token_bytes=width * policy.cache_values,
        longest=_longest(config),
        running=int(asked.get("max_batch", MAX_BATCH)),
        vocabulary=policy.vocabulary,
        layers=policy.layers,
        hidden=policy.hidden,
        derived_bytes=width * absorbed,
        widest=wide,
        batched_tokens=int(asked.get("max_num_batched_tokens") or EngineWork.batched_tokens),
        nccl_buffers=_buffers(config, policy) if _by_nccl(config) else None,
        graphs=0 if asked.get("enforce_eager") else None if graphs is None else len(graphs),
    )


# ---- what a run asks of its plan ----


def gpu_of(config: Config) -> RunPlan | None:
    """The plan of a run on GPUs; None on a CPU, and where the policy's weights are not there (yet)."""
    return make_plan(config) if placement.on_gpus(config) else None


def sleep_level(config: Config) -> int:
    """What engines do while the trainer works: 0, they stay awake; 1 or 2, they give their memory back. What
    engine_args say goes first; then, on a GPU that trainer and engines share, 0 where both fit at their fullest."""
    asked = config.rollout.engine_args.get("sleep_level")
    plan = gpu_of(config) if asked is None else None
    return int(asked or 0) if plan is None else plan.sleep_level


def engine_options(config: Config, kind: str) -> dict[str, Any]:
    """What an engine of `kind` is told of the plan; engine_args, which the user wrote, are laid over it."""
    plan = gpu_of(config) if kind == "vllm" else None
    if plan is None:
        return {}
    asked = config.rollout.engine_args
    options: dict[str, Any] = {"max_context": context(config), "sleep_level": plan.sleep_level}
    if "gpu_memory_utilization" not in asked:
        options["kv_cache_memory_bytes"] = plan.cache_bytes
        # With a cache of given size vLLM only checks at start that so much of the device is free.
        share = plan.engine.peak / plan.device.nbytes
        options["gpu_memory_utilization"] = max(0.01, math.floor(100 * min(share, 0.9)) / 100)
    return options


def describe(config: Config, plan: RunPlan | None, placed: list[str]) -> list[str]:
    """The plan as lines of text: batch, memory, and the lines of the placement between them."""
    batch = config.batch
    lines = [
        f"step       {batch.prompts} prompts x {batch.group_size} = {batch.prompts * batch.group_size} completions of "
        f"up to {config.rollout.max_tokens} tokens, {batch.minibatches} updates; staleness {config.staleness}",
        f"run        {config.steps} steps, {config.steps * batch.minibatches} updates, into {config.run_dir}",
        *placed,
        *_describe_policy(config),
    ]
    if plan is None:
        return [*lines, f"memory     unknown: {config.policy.path} holds no weights (yet)"]
    policy = plan.policy
    lines.append(f"policy     {count(policy.parameters)} parameters, {count(policy.active)} work on a token")
    lines += describe_gpu(plan) if plan.device.cuda else _tables(plan)
    lines.append(f"work       {plan.step_flop:.2g} FLOP a step if every completion is as long as it may be")
    return lines


def _describe_policy(config: Config) -> list[str]:
    """What ends a text and which rotation is held, where the folder is there and has a tokenizer."""
    folder, lines = Path(config.policy.path or ""), []
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
        lines.append(f"text ends  {text_end(folder, tokenizer).describe(tokenizer)}")
    if note := rotation_note(model_fields(folder), context(config)):
        lines.append(f"positions  {note}")
    return lines


def describe_gpu(plan: RunPlan) -> list[str]:
    """What stands on each GPU, part by part, and whether together or in turn."""
    device, at_once = plan.device, "together" if not plan.sleep_level else "in turn"
    found = "" if device.found else ", assumed: this machine has no GPU"
    lines = [f"GPU        {device.name}, {size(device.nbytes)}{found}; {size(device.room)} of it are planned with"]
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
    if not plan.lacking and plan.needed > device.room:
        over = size(plan.needed - device.room)
        lines.append(f"           {over} over what is planned with: it may run out of memory")
    lines += _tables(plan)
    if 0 < plan.cache_bytes < plan.full_cache_bytes:
        lines.append(
            f"           a cache of {size(plan.full_cache_bytes)} would hold all that a worker writes at full length; "
            "with less, the engine may write fewer at a time"
        )
    return lines


def _tables(plan: RunPlan) -> list[str]:
    lines: list[str] = []
    for name, held in (("trainer", plan.trainer), ("engine", plan.engine)):
        lines += [f"{name:<10} {size(held.peak)}", *held.lines()]
    return lines


def shortage(config: Config, plan: RunPlan) -> str | None:
    """Why memory cannot hold the run, by how much and what helps, or None: that of a GPU, or of this machine for a run
    on it alone."""
    if not plan.lacking:
        return None
    if not plan.device.cuda:
        return (
            f"the run needs at least {size(plan.needed)} for weights, gradients and optimizer, and {plan.device.name} "
            f"has {size(plan.device.nbytes)} of memory; use a smaller policy, or a cluster (cluster.address)"
        )
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
