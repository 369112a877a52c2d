"""What `rlzero sft` is told: rows, masking, epochs, batch, optimizer. Read from YAML like the config of a run of RL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from rlzero.config.read import Conflict, read_config
from rlzero.config.rl import Checkpoints, NonNegative, Positive, Tracker, _Section
from trainer.checkpoint.model_folder import model_fields, refusal
from trainer.model.balance import BalanceKind
from trainer.optimizer import OptimizerOptions
from trainer.parallel.ranks import ParallelOptions
from trainer.policy import PolicyOptions

OPEN_END = 2**31  # stands for the schedule's end until the rows are counted
TOTAL_STEPS = "follows from the rows, epochs and the size of a step; leave it out (max_steps ends a run early)"


class SftData(_Section):
    """Rows to learn from. A source is a file, a folder, a data set of the hub, a dump of `rlzero generate`, or
    `module:function` (also `file.py:function`), see rlzero.data.sources. A row is a conversation (`messages`), a pair
    (`prompt`, `completion`) or plain text (`text`); ShareGPT's and Alpaca's columns are known too."""

    train: str
    evaluation: str | None = None  # held-out rows of their own
    held_out: NonNegative = 0  # else this many rows of `train`, drawn once and for all, are never trained on
    params: dict[str, Any] = {}
    evaluation_params: dict[str, Any] = {}  # laid over `params` for the held-out source
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    text_column: str = "text"
    template: Literal["chat", "r1-zero", "none"] = "chat"
    system: str | None = None  # system message of rows without one (template chat)
    suffix: str | None = None  # follows the question of a pair as it is written
    chat_template: str | None = None  # a Jinja file in place of the tokenizer's own; saved with the model
    loss_on: Literal["completion", "all"] = "completion"  # completion: the assistant's turns only
    partial_answers: Literal["error", "learn"] = "error"  # of which the template drops a part, such as the thoughts
    max_tokens: Positive | None = None  # longest row; none takes the policy's context
    too_long: Literal["error", "truncate", "drop"] = "error"
    keep: Literal["correct", "all"] = "correct"  # of a dump: what its first reward that applies calls correct


class SftEvaluation(_Section):
    """Loss on the held-out rows: before the first step, after the last, and every `every` steps between."""

    every: NonNegative = 0


class SftConfig(_Section):
    """A run of supervised fine-tuning (or pre-training, on rows of text), complete and checked. The optimizer's
    defaults are those of R1's fine-tuning (arXiv 2501.12948, section 2.3 of its supplement): 5e-5, by a cosine to a
    tenth."""

    name: str = Field("sft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegative = 0
    output_dir: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: NonNegative = 0  # CPU threads; 0 leaves them to torch
    policy: PolicyOptions
    parallel: ParallelOptions = ParallelOptions()  # more than one rank: started by torchrun, DeepSeek-V3 models only
    save_dtype: Literal["float32", "bfloat16"] | None = None  # of the final folder; none keeps policy.dtype
    data: SftData
    epochs: Positive = 2
    max_steps: Positive | None = None  # ends the run, and its schedule, before the epochs do
    rows_per_step: Positive | None = None  # the size of an optimizer step: in rows ...
    tokens_per_step: Positive | None = None  # ... or in tokens, prompts included; exactly one of the two
    tokens_per_micro_batch: Positive = 65_536
    optimizer: OptimizerOptions = OptimizerOptions()
    mtp_weight: float = Field(0.0, ge=0)  # of multi-token prediction (DeepSeek-V3: 0.3, later 0.1)
    balance: BalanceKind = "none"  # balance loss of the routers, by sequence or over the step's tokens as one batch
    balance_weight: float = Field(0.0, ge=0)  # its α (DeepSeek-V3: 1e-4)
    evaluation: SftEvaluation = SftEvaluation()
    checkpoint: Checkpoints = Checkpoints()
    tracking: tuple[Tracker, ...] = ("tensorboard",)

    @model_validator(mode="before")
    @classmethod
    def _optimizer_defaults(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("optimizer") or {}, dict):
            return tree  # reported by the fields themselves
        defaults = {"lr": 5e-5, "schedule": "cosine", "min_lr_ratio": 0.1, "total_steps": OPEN_END}
        return {**tree, "optimizer": {**defaults, **(tree.get("optimizer") or {})}}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> SftConfig:
        """The run that `path` and the overrides describe. Raises `ConfigError` with every mistake found."""
        return read_config(cls, path, overrides, conflicts, {"optimizer.total_steps": TOTAL_STEPS})

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have."""
        limits = [self.data.max_tokens, policy_field(self.policy, "max_position_embeddings")]
        return min([self.tokens_per_micro_batch, *(limit for limit in limits if limit is not None)])

    def resolved_yaml(self) -> str:
        """Every field with its value; reading this text again gives an equal config."""
        tree = self.model_dump(mode="json")
        del tree["optimizer"]["total_steps"]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def conflicts(config: SftConfig) -> Iterator[Conflict]:
    """Contradictions between fields of `config`, and with the policy's own description where it is there."""
    data, policy = config.data, config.policy
    if (config.rows_per_step is None) == (config.tokens_per_step is None):
        found = "neither is set" if config.rows_per_step is None else "both are set"
        yield (
            ("rows_per_step", "tokens_per_step"),
            f"rows_per_step, tokens_per_step: {found}; give the size of an optimizer step as one of them "
            "(R1's fine-tuning: rows_per_step 128)",
        )
    if data.max_tokens is not None and data.max_tokens > config.tokens_per_micro_batch:
        yield (
            ("data.max_tokens", "tokens_per_micro_batch"),
            f"data.max_tokens: {data.max_tokens} tokens do not fit in tokens_per_micro_batch "
            f"{config.tokens_per_micro_batch}; a row is never split",
        )
    if policy.path is not None and (why := refusal(policy.path)):
        yield ("policy.path",), f"policy.path: {policy.path} {why}"
    context = policy_field(policy, "max_position_embeddings")
    if context is not None and data.max_tokens is not None and data.max_tokens > context:
        yield (
            ("data.max_tokens", "policy.path", "policy.init"),
            f"data.max_tokens: {data.max_tokens} is longer than the policy's context of {context} tokens "
            "(max_position_embeddings)",
        )
    if data.evaluation is not None and data.held_out:
        yield (
            ("data.evaluation", "data.held_out"),
            "data.held_out: data.evaluation names held-out rows already; leave one of them out",
        )
    if config.evaluation.every and data.evaluation is None and not data.held_out:
        yield (
            ("evaluation.every", "data.evaluation", "data.held_out"),
            f"evaluation.every: {config.evaluation.every}, but there are no held-out rows; set data.evaluation or "
            "data.held_out",
        )
    if data.system is not None and data.template != "chat":
        yield ("data.system", "data.template"), f"data.system: is for data.template chat, found {data.template}"
    if data.chat_template is not None and data.template != "chat":
        yield ("data.chat_template",), f"data.chat_template: is for data.template chat, found {data.template}"
    if policy.init is not None and policy.tokenizer is None:
        yield ("policy.init", "policy.tokenizer"), "policy.tokenizer: a new model (policy.init) needs a folder with one"
    if config.optimizer.total_steps != OPEN_END:
        yield ("optimizer.total_steps",), f"optimizer.total_steps: {TOTAL_STEPS}"
    if (config.balance == "none") != (config.balance_weight == 0):
        yield (
            ("balance", "balance_weight"),
            f"balance: {config.balance} with balance_weight {config.balance_weight:g}; set both (DeepSeek-V3: "
            "sequence, 1e-4) or neither",
        )
    kind = policy_field(policy, "model_type")
    if kind is not None and kind != "deepseek_v3":
        for name in ("mtp_weight", "balance_weight"):
            if getattr(config, name):
                yield (name,), f"{name}: is for DeepSeek-V3 models; this policy is a {kind}; set it to 0"
    elif kind is not None and config.mtp_weight and not (policy_field(policy, "num_nextn_predict_layers") or 0):
        yield (
            ("mtp_weight",),
            f"mtp_weight: {config.mtp_weight:g}, but the policy predicts no further tokens (num_nextn_predict_layers "
            "0); set it to 0",
        )
    if kind is not None and kind != "deepseek_v3" and config.parallel.ranks > 1:
        yield (
            ("parallel",),
            f"parallel: {config.parallel.ranks} ranks are for DeepSeek-V3 models; this policy is a {kind}; use one",
        )
    if config.device == "cpu" and policy.recipe == "fp8":
        yield (
            ("device", "policy.recipe"),
            "policy.recipe: fp8 needs a Hopper GPU and device is cpu; fp8_emulated gives its numbers anywhere",
        )
    if policy.recipe == "fp8" and policy.dtype == "float32":
        yield (
            ("policy.dtype", "policy.recipe"),
            "policy.recipe: fp8 quantizes BF16 weights and policy.dtype is float32; set policy.dtype=bfloat16",
        )


def policy_field(policy: PolicyOptions, name: str) -> Any:
    """A field of the policy's config.json; None where the folder is not there (yet) or does not say."""
    if policy.init is not None:
        return {"model_type": "deepseek_v3", **policy.init}.get(name)
    return model_fields(policy.path).get(name)
