"""Stages that make a model without reinforcement: the demo's base, pre-trained on generated text."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlzero.config.rl import Positive, _Section, read_config
from rlzero.examples.countdown import text as base_text
from trainer.batch import Batch
from trainer.model.balance import BalanceKind
from trainer.optimizer import OptimizerOptions
from trainer.packing import Sample, pack


class BaseConfig(_Section):
    """How the demo's base is made: a V3 model from fresh weights on rlzero.examples.countdown.text."""

    name: str = "demo-base"
    seed: int = 0
    steps: Positive
    tokens_per_step: Positive
    tokens_per_micro_batch: Positive
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of training
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    init: dict[str, Any]  # fields of trainer.model.v3_config.V3Config
    optimizer: OptimizerOptions
    mtp_weight: float = Field(0.1, ge=0)
    balance: BalanceKind = "none"  # see trainer.policy.Policy.next_token_loss
    balance_weight: float = Field(0.0, ge=0)
    patience: float = Field(ge=0, le=1)  # chance that a note goes on after a try that failed
    patient_share: float = Field(ge=0, le=1)  # of notes that never give up
    shares: dict[str, float] = base_text.SHARES
    output_dir: str = "runs"

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> BaseConfig:
        return read_config(cls, path, overrides)


def step_documents(config: BaseConfig, step: int, tokenizer: Any) -> list[list[int]]:
    """Token ids of the documents that step `step` trains on, each ended by EOS: a function of (config, step) alone."""
    rng = random.Random(f"base/{config.seed}/{step}")
    documents: list[list[int]] = []
    total = 0
    while total < config.tokens_per_step:
        texts = [
            base_text.document(rng, config.patience, config.patient_share, config.shares) for _ in range(64)
        ]
        for ids in tokenizer(texts)["input_ids"]:
            if total >= config.tokens_per_step:
                break
            documents.append([*ids, tokenizer.eos_token_id])
            total += len(documents[-1])
    return documents


_tokenizer: Any = None  # of a worker process


def _make_step(job: tuple[BaseConfig, int]) -> list[Batch]:
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = base_text.tokenizer()
    samples = [Sample(prompt_tokens=(), tokens=d, loss_on_prompt=True) for d in step_documents(*job, _tokenizer)]
    return pack(samples, job[0].tokens_per_micro_batch)


def steps_ahead(config: BaseConfig, steps: range) -> Iterator[list[Batch]]:
    """The packed documents of each step in order, made in other processes while the trainer works."""
    processes = max(1, (os.cpu_count() or 2) // 2)  # the trainer's own thread must not wait for a core
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = []
        for step in steps:
            waiting.append(pool.submit(_make_step, (config, step)))
            if len(waiting) > 2 * processes:
                yield waiting.pop(0).result()
        yield from (job.result() for job in waiting)


def pretrain(config: BaseConfig, say: Callable[[dict[str, float]], None], steps: int | None = None) -> Path:
    """Trains the base and returns its folder: Hugging Face layout, with tokenizer and `training.jsonl`.

    `steps` stops early without changing the schedule: the first steps of a recipe can be repeated and compared.
    """
    from trainer.policy import PolicyOptions
    from trainer.trainer import Trainer

    folder = Path(config.output_dir) / config.name
    tokenizer = base_text.tokenizer()
    init = {**config.init, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    trainer = Trainer(
        PolicyOptions(init=init, dtype=config.dtype),
        config.optimizer,
        None,
        seed=config.seed,
        threads=(os.cpu_count() or 1) if config.device == "cpu" else 2,
        device=config.device,
    )
    folder.mkdir(parents=True, exist_ok=True)
    last = min(config.steps, steps or config.steps)
    with open(folder / "training.jsonl", "w") as log:
        for step, batches in enumerate(steps_ahead(config, range(last))):
            began_s = time.monotonic()
            metrics = trainer.next_token_step(batches, config.mtp_weight, config.balance, config.balance_weight)
            line = {"step": step, **metrics, "time_s": time.monotonic() - began_s}
            log.write(json.dumps(line) + "\n")
            log.flush()
            say(line)
    trainer.policy.save(folder, dtype=config.save_dtype)
    tokenizer.save_pretrained(folder)
    return folder
