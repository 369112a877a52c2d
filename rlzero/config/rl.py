"""A run as one immutable record: read from YAML, changed by `a.b=c` overrides, every mistake listed in one error.

`Config.load("configs/r1-zero.yaml", ["steps=20", "policy.path=./base"])` returns a `Config` or raises `ConfigError`
(the commands turn it into exit code 2). Defaults are the published values of R1-Zero (arXiv 2501.12948, section
"Training details of DeepSeek-R1-Zero") wherever the paper gives one. A step here is one rollout of
`batch.prompts * batch.group_size` completions, trained in `batch.minibatches` optimizer steps; the paper counts
optimizer steps, so its 10,400 steps of 16 minibatches each are 650 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlzero.cluster import placement
from rlzero.config.read import Conflict, read_config
from trainer.checkpoint.model_folder import model_fields, position_limit, refusal
from trainer.losses import LossOptions
from trainer.optimizer import OptimizerOptions
from trainer.parallel.ranks import ParallelOptions
from trainer.policy import PolicyOptions


class _Section(BaseModel):
    """What every part of a config has in common: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- the sections ----------------------------------------------------------------------------------------------------

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Data(_Section):
    """Where questions come from. A source is `countdown`, a file, a folder, a data set of the hub, or `module:function`
    (also `file.py:function`) that returns rows; it is called with the params, and with `seed` and `split` if it takes
    them. See rlzero.data.sources."""

    train: str
    evaluation: str | None = None  # held-out questions; none means no evaluation
    params: dict[str, Any] = {}
    evaluation_params: dict[str, Any] = {}  # laid over `params` for the held-out source
    prompt_column: str = "prompt"
    answer_column: str | None = None  # must be in every row if set, and is what a reward gets as `answer`
    template: Literal["r1-zero", "chat", "none"] = "r1-zero"
    system: str | None = None  # system message of rows without one (template chat)
    suffix: str | None = None  # follows every question as it is written
    bad_rows: Literal["error", "drop"] = "error"  # that are too long, or that no completion can be paid for
    max_prompt_tokens: Positive = 1024


class Reward(_Section):
    """One checker: `package.module:function` or `./file.py:function`."""

    fn: str
    weight: float = 1.0  # the reward of the greatest weight that applies to a row decides what counts as correct
    timeout_s: float | None = Field(None, gt=0)  # by default the function's own: 5 s, 300 s for an async one
    params: dict[str, Any] = {}


class Batches(_Section):
    """Sizes, said once: a step writes prompts x group_size completions and trains on them in `minibatches` updates."""

    prompts: Positive = 512
    group_size: Positive = 16
    minibatches: Positive = 16
    tokens_per_micro_batch: Positive = 65_536


class RolloutOptions(_Section):
    """How completions are written. RL samples from the policy itself, so there is no top_p or top_k to set."""

    top_p: ClassVar[float] = 1.0
    top_k: ClassVar[int] = 0

    engine: Literal["auto", "torch", "vllm"] = "auto"
    workers: Positive = 1
    # Groups opened for each one that a step needs. Above 1 a step ends with the first `batch.prompts` complete groups;
    # the others go on in the next one, on its weights (partial rollouts), so that no step waits for the longest.
    oversample: float = Field(1.0, ge=1, le=2)
    engine_args: dict[str, Any] = {}  # passed to the engine as they are
    max_tokens: Positive = 32_768
    temperature: float = Field(1.0, gt=0)
    stop: tuple[str, ...] = ()
    transport: Literal["auto", "ipc", "nccl"] = "auto"
    max_gap: float = Field(0.05, gt=0)  # mean |logprob of engine - of trainer| at step 0 above which the run stops
    deadline_s: float = Field(3600.0, gt=0)  # a worker silent for longer is taken for dead


class Algorithm(_Section):
    """How rewards become advantages, and which groups and samples take part."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] = "grpo"
    max_refills: NonNegative = 0  # dynamic sampling (DAPO): waves that replace groups whose rewards are all equal
    # Soft punishment (DAPO): it starts this many tokens before max_tokens, 0 never, and a completion of max_tokens
    # loses that much.
    overlong: tuple[NonNegative, Annotated[float, Field(ge=0)]] = (0, 1.0)
    mask_truncated: bool = False  # completions cut at max_tokens teach nothing
    reference_refresh_steps: NonNegative = 25  # 400 of the paper's steps; 0 keeps the first reference

    @property
    def dynamic_sampling(self) -> bool:
        """Whether groups that teach nothing are replaced."""
        return self.max_refills > 0


class Checkpoints(_Section):
    every: NonNegative = 50  # steps; 0 saves at the end only
    keep: Positive = 3


class Evaluation(_Section):
    """Held-out questions, before the first step, after the last, and every `every` steps between."""

    every: NonNegative = 0
    prompts: Positive | None = None  # none takes all
    samples: Positive = 64
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class Cluster(_Section):
    """The Ray cluster: none starts one on this machine, `auto` joins the running one, else host:port. Trainer ranks and
    rollout workers share GPUs (colocated) or have their own, see rlzero.cluster.placement."""

    address: str | None = None
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    deadline_s: float = Field(300.0, gt=0)  # for joining, placing and starting the actors


Tracker = Literal["tensorboard", "wandb", "trackio"]


# Fields of the trainer's records that a run of reinforcement learning does not leave to the user.
NOT_CONFIGURED = {
    "policy.init": "reinforcement learning starts from a trained model; set policy.path to its folder",
    "policy.longest": "follows from data.max_prompt_tokens and rollout.max_tokens; leave it out",
    "policy.end_tokens": "follows from the folder of policy.path; leave it out",
    "policy.tokenizer": "a run takes the tokenizer in the folder of policy.path; leave it out",
    "optimizer.total_steps": "follows from steps and batch.minibatches; leave it out",
    "optimizer.betas": "are DeepSeek-V3's in reinforcement learning (0.9, 0.95); leave them out",
    "optimizer.min_lr_ratio": "a schedule of reinforcement learning ends at a tenth of optimizer.lr; leave it out",
    "optimizer.router_bias_gamma": "reinforcement learning keeps the routers' balance of pre-training; leave it out",
    "loss.constant_length": "follows from rollout.max_tokens; leave it out",
    "loss.teacher_coef": "a run of reinforcement learning has no teacher; leave it out",
    "parallel.pp": "a run trains whole models on every dp rank (docs/parallel.md, stages); leave it out",
    "parallel.schedule": "is one of stages, which a run does not have; leave it out",
    "parallel.deadline_s": "follows from rollout.deadline_s; leave it out",
}
UNTRUNCATED = "RL samples from the policy itself, untruncated; only evaluation.top_p can be set"


class Config(_Section):
    """A run of reinforcement learning, complete and checked."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegative = 0
    steps: Positive = 650
    output_dir: str = "runs"
    staleness: NonNegative = 0  # steps the sampling policy may lag behind; 0 is on-policy
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where the machine of the command has one
    threads: NonNegative = 0  # CPU threads of each trainer rank and rollout worker; 0 shares the machine's cores out
    policy: PolicyOptions
    data: Data
    rewards: tuple[Reward, ...] = Field(min_length=1)
    reward_workers: Positive = 2
    max_reward_error_rate: float = Field(0.05, ge=0, le=1)
    batch: Batches = Batches()
    rollout: RolloutOptions = RolloutOptions()
    algorithm: Algorithm = Algorithm()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    parallel: ParallelOptions = ParallelOptions()  # more than one rank: DeepSeek-V3 models only
    checkpoint: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    cluster: Cluster = Cluster()
    tracking: tuple[Tracker, ...] = ("tensorboard",)

    @model_validator(mode="before")
    @classmethod
    def _computed(cls, tree: Any) -> Any:
        """Fills in what NOT_CONFIGURED says follows from other fields. Values of the wrong type are left to the fields
        themselves, which report them."""
        if not isinstance(tree, dict):
            return tree
        sections = {name: tree.get(name, {}) for name in ("batch", "rollout", "optimizer", "loss", "parallel")}
        batch, rollout, optimizer, loss, parallel = (s if isinstance(s, dict) else None for s in sections.values())
        found = dict(tree)
        steps, minibatches = tree.get("steps", 650), (batch or {}).get("minibatches", 16)
        if optimizer is not None and _count(steps) and _count(minibatches):
            total, warmup = steps * minibatches, optimizer.get("warmup_steps", 0)
            if type(warmup) is int and optimizer.get("schedule", "constant") != "constant":
                total = max(total, warmup + 1)  # `conflicts` says what is wrong, in the fields that somebody wrote
            found["optimizer"] = {"total_steps": total, **optimizer}
        longest = (rollout or {}).get("max_tokens", 32_768)
        if loss is not None and loss.get("aggregation") == "constant" and _count(longest):
            found["loss"] = {"constant_length": longest, **loss}
        deadline_s = (rollout or {}).get("deadline_s", 3600.0)
        if parallel is not None and type(deadline_s) in (int, float) and deadline_s > 0:
            found["parallel"] = {"deadline_s": deadline_s, **parallel}
        return found

    @classmethod
    def load(cls, path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """The run that `path`, or the fields themselves, and the overrides describe. Raises `ConfigError` with
        every mistake found."""
        return read_config(
            cls,
            path,
            overrides,
            conflicts,
            NOT_CONFIGURED | {"rollout.top_p": UNTRUNCATED, "rollout.top_k": UNTRUNCATED},
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def resolved_yaml(self) -> str:
        """Every field with its value; reading this text again gives an equal config."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def resolved(self) -> dict[str, Any]:
        """Every field with its value as plain, nested dicts."""
        tree = self.model_dump(mode="json")
        for name in NOT_CONFIGURED:
            section, _, key = name.partition(".")
            tree[section].pop(key, None)
        return tree


# --- mistakes that no single field shows ------------------------------------------------------------------------------


def conflicts(config: Config) -> Iterator[Conflict]:
    """Contradictions between fields of `config`."""
    batch, rollout, data, algorithm = config.batch, config.rollout, config.data, config.algorithm

    completions = batch.prompts * batch.group_size
    if completions % batch.minibatches:
        yield (
            ("batch.prompts", "batch.group_size", "batch.minibatches"),
            f"batch: {batch.prompts} prompts x {batch.group_size} completions = {completions} cannot be split into "
            f"{batch.minibatches} equal minibatches; choose batch.minibatches that divides {completions}",
        )
    if batch.group_size == 1 and algorithm.advantage != "reinforce_pp":
        yield (
            ("batch.group_size", "algorithm.advantage"),
            f"batch.group_size: 1, but advantage {algorithm.advantage} compares the completions of a group; "
            "use at least 2, or algorithm.advantage=reinforce_pp",
        )
    if data.system is not None and data.template != "chat":
        yield ("data.system", "data.template"), f"data.system: is for data.template chat, found {data.template}"
    longest = data.max_prompt_tokens + rollout.max_tokens
    if batch.tokens_per_micro_batch < longest:
        yield (
            ("batch.tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_tokens"),
            f"batch.tokens_per_micro_batch: {batch.tokens_per_micro_batch} cannot hold one sample of "
            f"data.max_prompt_tokens {data.max_prompt_tokens} + rollout.max_tokens {rollout.max_tokens} = {longest}",
        )
    yield from _not_configured(config)
    kind = rollout.engine if rollout.engine != "auto" else "vllm" if placement.on_gpus(config) else "torch"
    if config.policy.path and (why := refusal(config.policy.path, kind)):
        yield ("policy.path",), f"policy.path: {config.policy.path} {why}"
    context = position_limit(model_fields(config.policy.path))
    if context is not None and longest > context:
        yield (
            ("policy.path", "data.max_prompt_tokens", "rollout.max_tokens"),
            f"rollout.max_tokens: data.max_prompt_tokens {data.max_prompt_tokens} + rollout.max_tokens "
            f"{rollout.max_tokens} = {longest} is longer than the policy's context of {context} tokens "
            f"(max_position_embeddings of {config.policy.path})",
        )
    updates, warmup = config.steps * batch.minibatches, config.optimizer.warmup_steps
    if config.optimizer.schedule != "constant" and warmup >= updates:
        yield (
            ("optimizer.warmup_steps", "steps", "batch.minibatches"),
            f"optimizer.warmup_steps: {warmup} updates of warm-up leave none of the run's {updates} (steps "
            f"{config.steps} x batch.minibatches {batch.minibatches}) to the {config.optimizer.schedule} schedule; "
            "lower optimizer.warmup_steps or raise steps",
        )
    if algorithm.overlong[0] >= rollout.max_tokens:
        yield (
            ("algorithm.overlong", "rollout.max_tokens"),
            f"algorithm.overlong: a buffer of {algorithm.overlong[0]} tokens covers the whole completion; "
            f"it must be smaller than rollout.max_tokens {rollout.max_tokens}",
        )
    if config.evaluation.every and not data.evaluation:
        yield (
            ("evaluation.every", "data.evaluation"),
            f"evaluation.every: {config.evaluation.every}, but data.evaluation names no held-out questions",
        )
    if config.evaluation.temperature == 0 and config.evaluation.samples > 1:
        yield (
            ("evaluation.temperature", "evaluation.samples"),
            f"evaluation.samples: {config.evaluation.samples} samples at temperature 0 are all the same; "
            "use evaluation.samples=1 or a temperature above 0",
        )
    if config.staleness and config.loss.correction == "none":
        yield (
            ("staleness", "loss.correction"),
            f"staleness: {config.staleness} trains on completions of older policies, and loss.correction none takes "
            "them for the policy's own; set loss.correction=tis (or icepop), or staleness=0",
        )
    if rollout.oversample > 1 and config.loss.correction == "none":
        yield (
            ("rollout.oversample", "loss.correction"),
            f"rollout.oversample: {rollout.oversample:g} trains on completions that older policies began, and "
            "loss.correction none takes them for the policy's own; set loss.correction=tis (or icepop), or "
            "rollout.oversample=1",
        )
    if config.loss.correction == "none":
        for name, unset in (("correction_bounds", None), ("correction_level", "token")):
            if getattr(config.loss, name) != unset:
                yield (
                    (f"loss.{name}", "loss.correction"),
                    f"loss.{name}: {getattr(config.loss, name)}, but loss.correction is none; set it to tis or icepop",
                )
    if algorithm.dynamic_sampling and batch.group_size == 1:
        yield (
            ("algorithm.max_refills", "batch.group_size"),
            f"algorithm.max_refills: {algorithm.max_refills}, but a group of one completion has always equal rewards "
            "and would be refilled for ever; use batch.group_size of at least 2, or algorithm.max_refills=0",
        )
    if config.device == "cpu" and config.policy.recipe == "fp8":
        yield (
            ("device", "policy.recipe"),
            "policy.recipe: fp8 needs a Hopper GPU and device is cpu; fp8_emulated gives its numbers anywhere",
        )
    if config.policy.recipe == "fp8" and config.policy.dtype == "float32":
        yield (
            ("policy.dtype", "policy.recipe"),
            "policy.recipe: fp8 quantizes BF16 weights and policy.dtype is float32; set policy.dtype=bfloat16",
        )
    yield from placement.conflicts(config, model_fields(config.policy.path))


def _not_configured(config: Config) -> Iterator[Conflict]:
    """Fields of the trainer's records that somebody set although NOT_CONFIGURED says why nobody does."""
    constant = config.loss.aggregation == "constant"
    expected = {
        "policy.init": (None,),
        "optimizer.betas": (OptimizerOptions().betas,),
        "optimizer.min_lr_ratio": (OptimizerOptions().min_lr_ratio,),
        "optimizer.router_bias_gamma": (0,),
        "policy.tokenizer": (None,),
        "policy.longest": (None,),
        "policy.end_tokens": (None,),
        # one more than the warm-up: see _computed; the warm-up itself is reported
        "optimizer.total_steps": (
            None,
            config.steps * config.batch.minibatches,
            max(config.steps * config.batch.minibatches, config.optimizer.warmup_steps + 1),
        ),
        "loss.constant_length": (config.rollout.max_tokens if constant else None,),
        "loss.teacher_coef": (0,),
        "parallel.pp": (1,),
        "parallel.schedule": ("1f1b",),
        "parallel.deadline_s": (config.rollout.deadline_s, ParallelOptions().deadline_s),
    }
    for name, values in expected.items():
        section, _, field = name.partition(".")
        if getattr(getattr(config, section), field) not in values:
            yield (name,), f"{name}: {NOT_CONFIGURED[name]}"


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1
