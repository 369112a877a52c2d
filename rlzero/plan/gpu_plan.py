"""What stands on each GPU of a run, before it starts: trainer and engine together or in turn, and the engine's cache.

Where trainer and engines share GPUs they stay there together if both fit at their fullest. Otherwise they take turns:
engines sleep (level 2, the cheapest on one H100: 0.05 s for a cycle of 1.5 GB, level 1 twice that, see
benchmarks/RESULTS.md) while the trainer works. vLLM is told how large its cache shall be, so nothing depends on which
process came first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlzero.cluster import placement
from rlzero.config.rl import Config
from rlzero.plan.gpu_memory import (
    BF16,
    FP32,
    MARGIN_SHARE,
    EngineWork,
    Held,
    TrainerWork,
    cache_for,
    engine_memory,
    recompute_of,
    sync_buffers,
    trainer_memory,
)
from rlzero.plan.policy_size import Policy

GIB = 1 << 30
ASSUMED, ASSUMED_BYTES = "H100 80GB", int(79.1 * GIB)  # torch finds this much on one
SLEEP_LEVEL = 2
MAX_BATCH = 256  # requests at a time of rollout.vllm.engine, where engine_args do not say
LEAST_CONTEXT = 64  # tokens; the probe's sequences must fit too


@dataclass(frozen=True)
class Device:
    name: str
    nbytes: int
    found: bool  # on this machine; else assumed


@dataclass(frozen=True)
class GpuPlan:
    """`engines` stand on the GPU of each trainer rank (`shared`), or each has its own."""

    device: Device
    trainer: Held
    engine: Held
    shared: bool
    engines: int
    sleep_level: int
    cache_bytes: int
    full_cache_bytes: int  # for all completions that an engine writes at a time, at full length

    @property
    def room(self) -> int:
        """What is planned with: the device less a margin for what an estimate may be wrong by."""
        return room_of(self.device)

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
        return self.trainer.peak + self._engines(self.engine.at_rest if self.sleep_level else self.engine.peak)

    @property
    def writing(self) -> int:
        """Bytes on an engine's GPU while it works."""
        if not self.shared:
            return self.engine.peak
        # A trainer that never gave memory back still holds its fullest moment's.
        return self._engines(self.engine.peak) + (self.trainer.at_rest if self.sleep_level else self.trainer.peak)

    def _engines(self, each: int) -> int:
        return self.engines * each if self.shared else 0


def room_of(device: Device) -> int:
    return round(device.nbytes * (1 - MARGIN_SHARE))


def find_device() -> Device:
    """This machine's first GPU, or the one that plans are made for where there is none."""
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Device(found.name, found.total_memory, True)
    return Device(ASSUMED, ASSUMED_BYTES, False)


def make_gpu_plan(config: Config, policy: Policy, device: Device | None = None) -> GpuPlan:
    """The plan of a run whose `device` is cuda."""
    device = device or find_device()
    ranks, asked = config.parallel, config.rollout.engine_args
    shared = placement.plan(config).shares_gpus
    engines = -(-config.rollout.workers // ranks.dp) if shared else 1
    if config.rollout.engine == "torch":  # it writes on the CPU
        none = Held()
        return GpuPlan(device, trainer_held(config, policy), none, False, 0, 0, 0, 0)
    trainer = trainer_held(config, policy)
    work, longest = engine_work(config, policy), context(config, policy)
    completions = -(-config.batch.prompts * config.batch.group_size // config.rollout.workers)
    least = cache_for(1, longest, work.token_bytes)
    full = max(least, cache_for(min(completions, work.running), work.longest, work.token_bytes))
    bare = engine_memory(work, 0)
    room = room_of(device)

    def cache_beside(trainer_bytes: int) -> int:
        """The largest cache for which there is room, at most a full one; less than `least` where there is none."""
        if given := asked.get("kv_cache_memory_bytes"):
            return int(given)
        if share := asked.get("gpu_memory_utilization"):  # vLLM fills up what it is given
            return int(share * device.nbytes) - bare.peak
        return min(full, (room - trainer_bytes) // engines - bare.peak)

    level = asked.get("sleep_level")
    cache = cache_beside(trainer.peak if shared else 0)
    if not shared:
        level = level or 0
    elif level is None:
        fits = cache >= min(full, int(asked.get("kv_cache_memory_bytes", full))) and (
            trainer.peak + engines * engine_memory(work, cache).peak <= room
        )
        level = 0 if fits or config.staleness else SLEEP_LEVEL  # engines that write all the time cannot sleep
    if shared and level:
        cache = cache_beside(trainer.at_rest)
    cache = max(cache, least)
    return GpuPlan(device, trainer, engine_memory(work, cache), shared, engines, level, cache, full)


def trainer_held(config: Config, policy: Policy) -> Held:
    ranks, batch = config.parallel, config.batch
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    update = -(-batch.prompts * batch.group_size // batch.minibatches) * longest  # tokens, if all are that long
    tokens = min(batch.tokens_per_micro_batch, update)
    width = _width(config)
    work = TrainerWork(
        tokens=tokens,
        micro_batches=-(-update // (tokens * ranks.dp)),
        recompute=recompute_of(config.policy.activation_checkpointing),
        width=width,
        moments=BF16 if config.optimizer.moments == "bfloat16" else FP32,
        master=BF16 if config.optimizer.algorithm == "adamw" else FP32,
        reference=config.loss.kl_coef > 0,
        dp=ranks.dp,
        ep=ranks.ep,
        reshard=ranks.reshard,
        reduce_each=ranks.reduce_each,
        nccl=_by_nccl(config),
    )
    return trainer_memory(architecture(policy), policy.by_layer, work, policy.mtp, _buffers(config, policy))


def _buffers(config: Config, policy: Policy) -> int:
    """What the weight sync packs into on either side of it. Weights of several ranks go through the CPU."""
    on_device = placement.plan(config).choice.transport in ("ipc", "nccl") and config.parallel.ranks == 1
    return sync_buffers(_width(config) * policy.parameters) if on_device else 0


def _by_nccl(config: Config) -> bool:
    return placement.plan(config).choice.transport == "nccl" and config.parallel.ranks == 1


def _width(config: Config) -> int:
    return BF16 if config.policy.dtype == "bfloat16" else FP32


def architecture(policy: Policy) -> Any:
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


def context(config: Config, policy: Policy) -> int:
    """Tokens that an engine must be able to hold of one request."""
    if asked := config.rollout.engine_args.get("max_context"):
        return int(asked)
    longest = max(config.data.max_prompt_tokens + config.rollout.max_tokens, LEAST_CONTEXT)
    return min(longest, policy.fields.get("max_position_embeddings") or longest)


def engine_work(config: Config, policy: Policy) -> EngineWork:
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
        longest=config.data.max_prompt_tokens + config.rollout.max_tokens,
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


def engine_options(config: Config, plan: GpuPlan, policy: Policy) -> dict[str, Any]:
    """What vLLM is told of the plan; engine_args, which the user wrote, are laid over it."""
    asked = config.rollout.engine_args
    options: dict[str, Any] = {"max_context": context(config, policy), "sleep_level": plan.sleep_level}
    if "gpu_memory_utilization" not in asked:
        options["kv_cache_memory_bytes"] = plan.cache_bytes
        # With a cache of given size vLLM only checks at start that so much of the device is free.
        share = plan.engine.peak / plan.device.nbytes
        options["gpu_memory_utilization"] = max(0.01, math.floor(100 * min(share, 0.9)) / 100)
    return options
