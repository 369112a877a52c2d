"""What training an architecture takes, before there are weights: parameters, memory per GPU, time per step.

A model config is `policy` (with `init`, the section that every other config has too), `placement`, `work` and
`optimizer`. Parameters are counted on torch's meta device, tensor by tensor, so weights, gradients and optimizer states
are exact for the placement; activations are estimates and marked so. Time is arithmetic at the measured rates of
rates.py over an openly assumed efficiency; communication, norms, routers, optimizer and gaps are in that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from rlzero.config.read import UsageError, read_config
from rlzero.config.rl import Positive, _Section
from rlzero.plan import rates
from rlzero.plan.gpu_memory import kept_of_layer
from rlzero.plan.run_plan import count, size
from trainer.optimizer import OptimizerOptions
from trainer.policy import PolicyOptions

if TYPE_CHECKING:
    from trainer.model.v3_config import V3Config

BF16, FP32 = 2, 4  # bytes
HEAD_CHUNK_TOKENS = 4096


class Placement(_Section):
    """`gpus` / `pipeline` data-parallel ranks hold each stage; their routed experts are split over groups of `experts`.
    ZeRO stage 1 shards the optimizer over the ranks that hold the same weights, 2 the gradients too, 3 all (FSDP)."""

    gpus: Positive = 1
    pipeline: Positive = 1
    experts: Positive = 1
    zero: Literal[0, 1, 2, 3] = 1
    # selective: norms and MLA's up-projections, as DeepSeek-V3; the trainer's own selective makes other parts again
    recompute: Literal["none", "selective", "full"] = "selective"
    memory_gib: float = Field(79.1, gt=0)  # of one GPU; torch finds this much on an H100 80GB
    efficiency: float = Field(rates.EFFICIENCY, gt=0, le=1)  # share of the time spent in the kernels that are counted


class Work(_Section):
    """Of an optimizer step, over all GPUs; a micro-batch is one data-parallel rank's."""

    tokens_per_step: Positive = 1_048_576
    tokens_per_micro_batch: Positive = 16_384
    document_tokens: Positive = 4096


class ModelConfig(_Section):
    """An architecture with a placement for `rlzero plan`."""

    name: str
    policy: PolicyOptions
    placement: Placement = Placement()
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
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.placement.gpus // self.placement.pipeline

    @property
    def micro_batches(self) -> int:
        """Of one rank in a step."""
        return self.work.tokens_per_step // (self.replicas * self.work.tokens_per_micro_batch)


def is_model_config(path: str | Path) -> bool:
    """Whether a YAML file is one of these, by its sections."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        return False  # whoever reads it next says what is wrong
    return isinstance(tree, dict) and "placement" in tree and "policy" in tree


def _conflicts(config: ModelConfig):
    place, work = config.placement, config.work
    try:
        model = config.architecture
    except (ValueError, OSError) as error:
        yield ("policy",), f"policy: {error}"
        return
    if place.gpus % place.pipeline:
        text = f"placement: {place.gpus} GPUs do not divide into {place.pipeline} pipeline stages"
        yield ("placement.gpus", "placement.pipeline"), text
        return
    if place.pipeline > model.num_hidden_layers:
        text = f"placement.pipeline: {place.pipeline} stages for {model.num_hidden_layers} layers"
        yield ("placement.pipeline",), text
    if config.replicas % place.experts or (place.experts > 1 and model.n_routed_experts % place.experts):
        text = (
            f"placement.experts: groups of {place.experts} must divide the {config.replicas} ranks of a stage and the "
            f"{model.n_routed_experts} routed experts"
        )
        yield ("placement.experts", "placement.gpus"), text
    unit = config.replicas * work.tokens_per_micro_batch
    if work.tokens_per_step % unit:
        text = (
            f"work.tokens_per_step: {work.tokens_per_step} is no multiple of {config.replicas} ranks x "
            f"{work.tokens_per_micro_batch} tokens = {unit}"
        )
        yield ("work.tokens_per_step", "work.tokens_per_micro_batch"), text
    if work.document_tokens > work.tokens_per_micro_batch:
        yield ("work.document_tokens",), "work.document_tokens: longer than work.tokens_per_micro_batch"


# ---- counting ----


@dataclass
class Part:
    """A layer, an embedding, a head: parameters that every rank of its stage holds, those split over the expert groups,
    and how many of both are multiplied in the recipe's precision."""

    name: str
    dense: int = 0
    routed: int = 0
    quantized_dense: int = 0
    forward_flop: dict[str, float] = field(default_factory=dict)  # per token, by kernel: linear, grouped, attention


@dataclass(frozen=True)
class Size:
    """Parameters. `active` work on a token: no embedding, of the routed experts the chosen share (DeepSeek's 37 B).
    `mtp` are the MTP layers' own, `mtp_in_folder` with the copies of embedding and head that a folder repeats."""

    main: int
    active: int
    mtp: int
    mtp_in_folder: int
    folder_bytes: dict[str, int]  # of a Hugging Face folder, by format


def count_parameters(model: V3Config) -> tuple[Size, list[Part]]:
    """The size, and the parts in the order of the computation: embedding, layers, head, MTP layers."""
    import torch

    from trainer.checkpoint import hf
    from trainer.model.v3 import V3Model

    with torch.device("meta"):
        tensors = dict(hf.named_checkpoint_tensors(V3Model(model).to(torch.bfloat16)))
    own = {n: t.numel() for n, t in tensors.items() if not n.endswith("e_score_correction_bias")}
    copies = [n for n in own if n.startswith("model.layers.") and (".embed_tokens." in n or ".shared_head.head." in n)]
    if model.tie_word_embeddings:
        copies.append("lm_head.weight")
    extra = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    mtp_names = [n for i in extra for n in own if n.startswith(f"model.layers.{i}.")]
    in_folder = sum(own[n] for n in mtp_names)
    for name in copies:
        del own[name]
    parts = [Part("embedding", own["model.embed_tokens.weight"])]
    parts += [_layer(model, own, i) for i in range(model.num_hidden_layers)]
    head = model.vocab_size * model.hidden_size
    parts.append(Part("head", own.get("lm_head.weight", 0) + own["model.norm.weight"], forward_flop={"head": 2 * head}))
    for i in extra:
        layer = _layer(model, own, i)
        layer.forward_flop = {**layer.forward_flop, "head": 2.0 * head}
        parts.append(layer)
    mtp = sum(own.get(n, 0) for n in mtp_names)
    main = sum(own.values()) - mtp
    routed = sum(part.routed for part in parts[1 : 1 + model.num_hidden_layers])
    idle = routed * (model.n_routed_experts - model.num_experts_per_tok) // max(model.n_routed_experts, 1)
    embedding = 0 if model.tie_word_embeddings else own["model.embed_tokens.weight"]
    folders = {f: sum(e.nbytes for e in hf.layout(tensors.items(), f)) for f in ("bf16", "fp8")}
    return Size(main, main - idle - embedding, mtp, in_folder, folders), parts


def _layer(model: V3Config, own: dict[str, int], index: int) -> Part:
    prefix = f"model.layers.{index}."
    names = {n.removeprefix(prefix): size for n, size in own.items() if n.startswith(prefix)}
    routed = sum(size for n, size in names.items() if ".experts." in n)
    dense = sum(names.values()) - routed
    quantized = sum(s for n, s in names.items() if ".experts." not in n and n.endswith(("proj.weight", "mqa.weight")))
    share = model.num_experts_per_tok / max(model.n_routed_experts, 1)
    return Part(
        prefix.removesuffix("."), dense, routed, quantized, {"linear": 2.0 * quantized, "grouped": 2 * routed * share}
    )


# ---- placing ----


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
    """`memory` is the fullest GPU's, in bytes by part; times are seconds of the slowest stage."""

    size: Size
    memory: dict[str, int]
    stage: int  # the fullest
    kernel_s: dict[str, float]  # of one micro-batch, forward and backward, all stages
    slowest_stage_s: float  # of one micro-batch
    bubble: float  # share of a step that a stage waits for the first and the last micro-batch
    step_s: float
    model_flop: float  # of a step, forward and backward, nothing counted twice


def make_model_plan(config: ModelConfig) -> ModelPlan:
    model, place, work = config.architecture, config.placement, config.work
    total, parts = count_parameters(model)
    tokens = work.tokens_per_micro_batch
    # A causal token sees half of its document on average; 2 FLOP for each of q k and p v.
    attention = work.document_tokens * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    for part in parts:
        if "linear" in part.forward_flop:
            part.forward_flop["attention"] = float(attention)
    seconds = [{k: _kernel_s(k, flop * tokens, model, config) for k, flop in p.forward_flop.items()} for p in parts]
    cut = stages(parts, place.pipeline, [sum(s.values()) for s in seconds])
    by_part = {part.name: sum(s.values()) for part, s in zip(parts, seconds, strict=True)}
    slowest = max(sum(by_part[part.name] for part in stage) for stage in cut) / place.efficiency
    turns = config.micro_batches + place.pipeline - 1
    memory = [_memory(config, stage, i) for i, stage in enumerate(cut)]
    fullest = max(range(len(cut)), key=lambda i: sum(memory[i].values()))
    kernels = {k: sum(s.get(k, 0.0) for s in seconds) for k in ("linear", "grouped", "attention", "head")}
    flop = 3 * sum(sum(part.forward_flop.values()) for part in parts) * work.tokens_per_step
    return ModelPlan(
        size=total,
        memory=memory[fullest],
        stage=fullest,
        kernel_s=kernels,
        slowest_stage_s=slowest,
        bubble=(place.pipeline - 1) / turns,
        step_s=slowest * turns,
        model_flop=flop,
    )


def _kernel_s(kernel: str, forward_flop: float, model: V3Config, config: ModelConfig) -> float:
    """Of one GPU for a micro-batch, forward and backward."""
    recipe = "fp8" if config.policy.recipe == "fp8" else "bf16"
    again = float(config.placement.recompute == "full")
    if kernel == "attention":
        return rates.attention_seconds(forward_flop, again)
    if kernel == "head":
        return rates.LINEAR["bf16"].seconds(forward_flop)
    if kernel == "grouped":
        return rates.GROUPED[recipe].seconds(forward_flop, again)
    if config.placement.recompute == "selective":
        heads, kv = model.num_attention_heads, model.kv_lora_rank
        up = kv * heads * (model.qk_nope_head_dim + model.v_head_dim) + (model.q_lora_rank or 0) * heads * (
            model.qk_head_dim
        )
        again = min(1.0, 2.0 * up * config.work.tokens_per_micro_batch / forward_flop)
    return rates.LINEAR[recipe].seconds(forward_flop, again)


def _memory(config: ModelConfig, stage: Sequence[Part], index: int) -> dict[str, int]:
    place, model = config.placement, config.architecture
    copies_dense, copies_routed = config.replicas, config.replicas // place.experts
    dense = sum(part.dense for part in stage)
    routed = sum(part.routed for part in stage) // place.experts
    last = index == place.pipeline - 1
    if place.pipeline > 1 and last and model.num_nextn_predict_layers:
        dense += model.vocab_size * model.hidden_size  # MTP's embedding, a copy of the first stage's

    def sharded(bytes_each: int, from_stage: int) -> int:
        over = (copies_dense, copies_routed) if place.zero >= from_stage else (1, 1)
        return bytes_each * (-(-dense // over[0]) + -(-routed // over[1]))

    low = config.policy.dtype == "bfloat16"
    moments = BF16 if config.optimizer.moments == "bfloat16" else FP32
    memory = {
        f"weights ({'BF16' if low else 'FP32'})": sharded(BF16 if low else FP32, 3),
        "master weights (FP32)": sharded(FP32, 1) if low else 0,
        f"optimizer moments ({'BF16' if moments == BF16 else 'FP32'})": sharded(2 * moments, 1),
        "gradients (FP32)": sharded(FP32, 2),
    }
    if place.zero == 3:
        largest = max(part.dense + part.routed // place.experts for part in stage)
        memory["weights gathered for two layers"] = 2 * BF16 * largest
    if config.policy.recipe == "fp8":
        # Both layouts: the products with the weight and with its transpose need one each.
        memory["FP8 forms of the weights"] = 2 * (sum(part.quantized_dense for part in stage) + routed)
    in_flight = min(config.micro_batches, place.pipeline - index)  # 1F1B: the first stage runs ahead the furthest
    layers = [part for part in stage if part.name not in ("embedding", "head")]
    kept = sum(kept_bytes(config, dense=not part.routed) for part in layers)
    whole = max((kept_bytes(config, not part.routed, "none") for part in layers), default=0)
    tokens = config.work.tokens_per_micro_batch
    memory[f"activations of {in_flight} micro-batches, about"] = in_flight * tokens * kept
    if place.recompute != "none":
        memory["one layer's activations made again, about"] = tokens * whole
    if any(part.name == "head" for part in stage):
        memory["a chunk of logits and their gradient, about"] = (
            min(tokens, HEAD_CHUNK_TOKENS) * model.vocab_size * 2 * FP32
        )
    return memory


def kept_bytes(config: ModelConfig, dense: bool, recompute: str | None = None) -> int:
    """What one layer keeps of one token for the backward pass: in BF16 with nothing made again, what this trainer's
    kernels keep. Else about that: inputs of norms and of Linear (one byte a value in FP8), attention's operands and
    result, gate and up of the MLPs, whose product is made again; less what `recompute` makes again."""
    m, recompute = config.architecture, recompute or config.placement.recompute
    fp8 = config.policy.recipe == "fp8"
    if not fp8 and recompute == "none":
        return kept_of_layer(m, dense, "none")
    width = 1 + FP32 / 128 if fp8 else BF16  # of the input of a Linear: FP8 with a scale for every 128
    hidden, heads, latent = m.hidden_size, m.num_attention_heads, m.kv_lora_rank + m.qk_rope_head_dim
    if recompute == "full":
        return BF16 * hidden
    query = m.q_lora_rank or 0
    result = 2 * hidden * BF16 + (query + latent) * BF16  # what the norms read
    result += heads * (m.v_head_dim * BF16 + FP32)  # attention's result and log-sum-exp
    wide = m.intermediate_size if dense else m.n_shared_experts * m.moe_intermediate_size
    result += 2 * wide * width  # gate and up; SwiGLU is always made again
    if not dense:
        result += m.num_experts_per_tok * (hidden + 2 * m.moe_intermediate_size) * width + m.n_routed_experts * FP32
    if recompute == "none":
        result += (2 * hidden + query + m.kv_lora_rank) * width  # what the norms write
        result += heads * (2 * m.qk_head_dim + m.v_head_dim) * BF16  # q, k, v
    return round(result)


# ---- words ----


def describe_model(config: ModelConfig, plan: ModelPlan) -> list[str]:
    """The plan as lines of text."""
    total, place, work = plan.size, config.placement, config.work
    lines = [
        f"model      {config.name}: {count(total.main)} parameters ({total.main:,}), {count(total.active)} work on a "
        f"token ({total.active:,}, without the embedding)"
    ]
    if total.mtp:
        lines.append(
            f"           MTP: {count(total.mtp)} more ({total.mtp:,}); {count(total.mtp_in_folder)} in a folder, which "
            "repeats embedding and head"
        )
    lines.append(
        f"folder     {size(total.folder_bytes['bf16'])} in BF16, {size(total.folder_bytes['fp8'])} in block-FP8"
    )
    lines.append(
        f"placement  {place.gpus} GPUs: {place.pipeline} pipeline stage(s) x {config.replicas} data-parallel ranks, "
        f"experts over {place.experts}, ZeRO-{place.zero}, recompute {place.recompute}, recipe {config.policy.recipe}"
    )
    used = sum(plan.memory.values())
    fits = "fits" if used <= place.memory_gib * 2**30 else "DOES NOT FIT"
    where = f"the fullest GPU (stage {plan.stage + 1})" if place.pipeline > 1 else "every GPU"
    lines.append(f"memory     {size(used)} on {where}: {fits} in {place.memory_gib:g} GiB")
    lines += [f"             {size(value):>10}  {part}" for part, value in plan.memory.items() if value]
    lines.append(
        f"step       {work.tokens_per_step:,} tokens: {config.micro_batches} micro-batches of "
        f"{work.tokens_per_micro_batch:,} on every rank, documents of {work.document_tokens:,}"
    )
    per_gpu = plan.model_flop / plan.step_s / place.gpus
    hours = plan.step_s * place.gpus / 3600 / work.tokens_per_step * 1e12
    lines.append(
        f"time       {_seconds(plan.step_s)} a step, {work.tokens_per_step / plan.step_s:,.0f} tokens/s, "
        f"{per_gpu / rates.TERA:.0f} TFLOP/s a GPU ({per_gpu / rates.H100_BF16_FLOPS:.0%} of an H100's dense BF16), "
        f"{hours / 1e3:.3g} K GPU hours per trillion tokens"
    )
    everything = sum(plan.kernel_s.values())
    shares = ", ".join(f"{name} {value / everything:.0%}" for name, value in plan.kernel_s.items())
    lines.append(
        f"           kernels at measured rates (plan/rates.py): {shares}. Assumed: they take {place.efficiency:.0%} "
        f"of the time, the rest is communication, norms, routers, optimizer. Pipeline bubble: {plan.bubble:.0%}"
    )
    if config.policy.recipe == "fp8" and plan.kernel_s["grouped"]:
        lines.append("           Experts count at DeepGEMM's FP8 rates; this trainer's fp8 has them in BF16 so far")
    return lines


def shortage_of_memory(config: ModelConfig, plan: ModelPlan) -> UsageError | None:
    """The error to raise where a GPU cannot hold its part, or None."""
    used = sum(plan.memory.values())
    if used <= config.placement.memory_gib * 2**30:
        return None
    return UsageError(
        f"a GPU would need {size(used)} and has {config.placement.memory_gib:g} GiB: raise placement.gpus, "
        "placement.pipeline, placement.experts or placement.zero, or recompute more"
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def plan_text(path: str | Path, overrides: Sequence[str]) -> tuple[list[str], Any]:
    """Lines to print, and what is short (an exception, or None)."""
    config = ModelConfig.load(path, overrides)
    plan = make_model_plan(config)
    return describe_model(config, plan), shortage_of_memory(config, plan)
