"""Supervised fine-tuning: next-token training on rows, in this process or those of torchrun. What `rlzero sft` runs.

A run is a function of its config and rows: the epochs' order depends on (seed, epoch), the steps on the rows' lengths,
so a resumed run goes on exactly where it was (bit for bit on a CPU). Its folder is like that of a run of RL: config,
metrics, evaluations, checkpoints; and `model`, the trained Hugging Face folder.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlzero import interrupt, run_folder
from rlzero.config.read import UsageError
from rlzero.config.sft import SftConfig
from rlzero.data.examples import Examples, Progress, load_examples, load_sft_tokenizer
from rlzero.report.display import counting
from rlzero.report.log import RunLog
from rlzero.stages.export import export
from trainer.batch import Batch
from trainer.checkpoint import checkpoint
from trainer.checkpoint.model_folder import TextEnd, text_end
from trainer.packing import pack
from trainer.parallel.ranks import ParallelOptions
from trainer.trainer import Trainer

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


# --- the order of the rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which rows every step learns from: step s takes `order[ends[s - 1]:ends[s]]` (from 0 for the first)."""

    order: list[int]
    ends: list[int]

    @property
    def steps(self) -> int:
        return len(self.ends)

    def rows(self, step: int) -> list[int]:
        return self.order[self.start(step) : self.ends[step]]

    def start(self, step: int) -> int:
        """Rows taken before step `step`."""
        return self.ends[step - 1] if step else 0


def make_plan(lengths: Sequence[int], config: SftConfig) -> Plan:
    """The steps of all epochs, each epoch in an order of its own that depends on (seed, epoch) alone. A step has
    `rows_per_step` rows, or as many as do not pass `tokens_per_step` tokens (at least one); it may cross from one
    epoch into the next, and the last takes what is left."""
    order: list[int] = []
    for epoch in range(config.epochs):
        indices = list(range(len(lengths)))
        random.Random(f"sft/{config.seed}/{epoch}").shuffle(indices)
        order += indices
    if config.rows_per_step is not None:
        ends = [*range(config.rows_per_step, len(order), config.rows_per_step), len(order)]
    else:
        assert config.tokens_per_step is not None
        ends, held = [], 0
        for position, index in enumerate(order):
            if held and held + lengths[index] > config.tokens_per_step:
                ends.append(position)
                held = 0
            held += lengths[index]
        ends.append(len(order))
    return Plan(order, ends[: config.max_steps])


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """What a run knows before a model is loaded."""

    config: SftConfig
    tokenizer: Any
    train: Examples
    held_out: Examples | None
    plan: Plan
    end: TextEnd

    def describe(self) -> list[str]:
        """The run in a few lines: rows, tokens, steps."""
        config, plan = self.config, self.plan
        lines = [f"rows       {_rows_line(self.train, config.data.train)}"]
        if self.held_out is not None:
            lines.append(f"held out   {_rows_line(self.held_out, config.data.evaluation or config.data.train)}")
        lines.append(f"longest    {max(self.train.lengths):,} tokens of {config.longest_row:,}")
        if self.train.answers_learned < 1:
            lines.append(f"answers    {self.train.answers_learned:.0%} of their words are learned, the template cuts")
        size = f"{config.rows_per_step} rows" if config.rows_per_step else f"{config.tokens_per_step:,} tokens"
        epochs = plan.ends[-1] / len(self.train)
        lines.append(f"steps      {plan.steps:,} of {size}, {epochs:.3g} epochs")
        return [*lines, f"text ends  {self.end.describe(self.tokenizer)}"]


def prepare(config: SftConfig, progress: Progress = lambda done, total: None) -> Prepared:
    """Reads and checks all rows. Raises `UsageError` for whatever a user would have to mend."""
    tokenizer = load_sft_tokenizer(config)
    train, held_out = load_examples(config, tokenizer, progress)
    plan = make_plan(train.lengths, config)
    options = config.optimizer
    if options.schedule != "constant" and options.warmup_steps >= plan.steps:
        raise UsageError(
            f"optimizer.warmup_steps: {options.warmup_steps}, but the run has {plan.steps} steps; nothing is left for "
            f"the {options.schedule} schedule"
        )
    folder = config.policy.path or str(config.policy.tokenizer_folder)
    return Prepared(config, tokenizer, train, held_out, plan, text_end(folder, tokenizer, train.ends(tokenizer)))


def train(config: SftConfig, resume: bool | str, say: Say = lambda line: None) -> Path:
    """The whole run; returns the folder of the trained model. A signal saves and raises
    `interrupt.Interrupted`. Raises `UsageError` where the folder cannot be had (`run_folder.claimed`)."""
    folder, rank = config.run_dir, rank_here(config.parallel)
    if rank:
        say = _say_nothing
    with run_folder.claimed(folder, resume) if rank == 0 else nullcontext(None) as newest:
        if rank:
            newest = checkpoint.latest(folder / "checkpoints")
        with counting("reading") as progress:
            prepared = prepare(config, progress)
        for line in prepared.describe():
            say(line)
        if rank == 0:
            (folder / "config.yaml").write_text(config.resolved_yaml())
        run = SftRun(prepared, rank, say)
        run.start(newest)
        with run.interruptible():
            return run.finish() if run.work() else _stopped(run)


def rank_here(parallel: ParallelOptions) -> int:
    """Which of the run's ranks this process is. Raises `UsageError` where it is to be one of several and torchrun did
    not start as many."""
    if parallel.ranks == 1:
        return 0
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != parallel.ranks or "RANK" not in os.environ:
        raise UsageError(
            f"parallel: dp {parallel.dp} x pp {parallel.pp} are {parallel.ranks} processes, found {started}; start "
            f"them with `torchrun --nproc-per-node {parallel.ranks} --no-python rlzero sft ...` (more nodes: see "
            "torchrun)"
        )
    return int(os.environ["RANK"])


def _say_nothing(line: str) -> None:
    pass


def _stopped(run: SftRun) -> Path:
    run.say(f"stopped before step {run.step + 1}; `rlzero sft ... --resume` goes on")
    raise interrupt.Interrupted(run.stopping or signal.SIGINT)


class SftRun:
    """Owns this rank's trainer and, on rank 0, the run's files. Every method is called on all ranks."""

    def __init__(self, prepared: Prepared, rank: int, say: Say):
        self.config, self.plan, self.train, self.say = prepared.config, prepared.plan, prepared.train, say
        config = self.config
        self.tokenizer = prepared.tokenizer
        self.dir = config.run_dir
        self.log = RunLog(self.dir, config.tracking, yaml.safe_load(config.resolved_yaml())) if rank == 0 else None
        self.step = 0  # the next one
        self.stopping = 0  # the signal that asked the run to end
        held_out = prepared.held_out
        self.held_out: list[Batch] = (
            pack([row.sample for row in held_out], config.tokens_per_micro_batch) if held_out is not None else []
        )
        policy = config.policy.model_copy(update={"longest": config.longest_row, "end_tokens": prepared.end.ids})
        if config.data.chat_template is not None:  # the checkpoints take their tokenizer from a folder
            policy = policy.model_copy(update={"tokenizer": str(self.dir / "tokenizer")})
            if rank == 0:
                self._save_tokenizer(self.dir / "tokenizer")
        self.trainer = Trainer(
            policy,
            config.optimizer.model_copy(update={"total_steps": self.plan.steps}),
            None,
            seed=config.seed,
            threads=config.threads,
            device=config.device,
            parallel=config.parallel,
        )
        self.ranks = self.trainer.ranks

    def start(self, newest: Path | None) -> None:
        """From the beginning, or from a checkpoint of this run."""
        if newest is not None:
            state = self.trainer.load(newest)
            self.step = state["step"]
            if self.step > self.plan.steps:
                raise UsageError(
                    f"{newest}: has {self.step} steps, and the run is to have {self.plan.steps}; raise epochs or "
                    "max_steps, or start a new run under another name"
                )
            here = self._state()
            if changed := [key for key in here if state.get(key) != here[key]]:
                raise UsageError(
                    f"{newest}: was made with another {' and '.join(changed)} "
                    f"(saved {[state.get(key) for key in changed]}, now {[here[key] for key in changed]}); resume with "
                    "the config and files of the run, or start a new run under another name"
                )
            self.say(f"going on from {newest.name}")
        if self.log is not None:
            self.log.rewind(self.step, evaluations=newest is not None)

    def work(self) -> bool:
        """The steps that are left; False where Ctrl-C ended them early."""
        self.evaluate()
        while self.step < self.plan.steps:
            began_s = time.monotonic()
            rows = [self.train[i] for i in self.plan.rows(self.step)]
            batches = pack([row.sample for row in rows], self.config.tokens_per_micro_batch)
            config = self.config
            metrics = self.trainer.next_token_step(
                batches, mtp_weight=config.mtp_weight, balance=config.balance, balance_weight=config.balance_weight
            )
            seconds = time.monotonic() - began_s
            tokens = sum(len(row.tokens) for row in rows)
            line = {
                "step": self.step,
                "epoch": self.plan.ends[self.step] / len(self.train),
                "rows": len(rows),
                **metrics,
                "packed_tokens": tokens,
                "tokens_per_s": tokens / max(seconds, 1e-9),
                "time_step_s": seconds,
            }
            if self.log is not None:
                self.log.metrics(line)
            self.say(_step_line(line, self.plan.steps))
            self.step += 1
            self.stopping = self.ranks.agree(self.stopping)
            self.evaluate()
            self.save()
            if self.stopping and self.step < self.plan.steps:
                return False
        return True

    def evaluate(self) -> None:
        """Mean loss on the held-out rows, in nats per learned token: before the first step, after the last, and every
        `evaluation.every` steps between."""
        every = self.config.evaluation.every
        due = self.step in (0, self.plan.steps) or (every and self.step % every == 0)
        done = self.log is not None and self.step in self.log.evaluated
        if not self.held_out or not due or self.ranks.agree(done):
            return
        began_s = time.monotonic()
        total = sum(values.double().sum().item() for values in self.trainer.logprobs(self.held_out))
        result = {"loss": -total / self.held_out[0].total_tokens, "tokens": self.held_out[0].total_tokens}
        if self.log is not None:
            self.log.evaluation({"step": self.step, **result, "time_s": time.monotonic() - began_s})
        self.say(f"held-out loss after {self.step} steps: {result['loss']:.4f}")

    def save(self) -> None:
        """A checkpoint of the boundary before the next step, if one is due: on the schedule, at the end, on Ctrl-C."""
        every = self.config.checkpoint.every
        if not (self.stopping or self.step == self.plan.steps or (every and self.step % every == 0)):
            return
        folder = self.dir / "checkpoints"
        self.trainer.save(folder / f"step-{self.step:06d}", {"step": self.step, **self._state()})
        if self.log is not None:
            checkpoint.keep_last(folder, self.config.checkpoint.keep)

    def finish(self) -> Path:
        """Writes the trained model as a plain Hugging Face folder with its tokenizer: `model` in the run's folder."""
        target = self.dir / "model"
        if self.log is not None:
            shutil.rmtree(target, ignore_errors=True)  # of a run that had ended already
            export(self.dir / "checkpoints" / f"step-{self.step:06d}", target, self.config.save_dtype)
            self.tokenizer.save_pretrained(target)
        self.ranks.barrier()
        return target

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first signal ends the run after the step in flight, a second Ctrl-C at once."""

        def stop(number: int) -> None:
            self.stopping = number
            self.say("stopping after this step")

        try:
            with interrupt.graceful(stop):
                yield
        finally:
            if self.log is not None:
                self.log.close()
            self.ranks.close()

    def _state(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with."""
        return {"data": self.train.fingerprint, "seed": self.config.seed, "position": self.plan.start(self.step)}

    def _save_tokenizer(self, folder: Path) -> None:
        """What the checkpoints take their tokenizer from, where it is not the policy's own."""
        self.tokenizer.save_pretrained(folder)


def _rows_line(examples: Examples, source: str) -> str:
    tokens, learned = examples.tokens, examples.learned
    left_out = "".join(f", {count:,} {name}" for name, count in examples.counts.items() if count)
    return f"{len(examples):,} of {source}, {tokens:,} tokens, {learned / tokens:.0%} of them learned{left_out}"


def _step_line(line: dict[str, Any], steps: int) -> str:
    """One step in one line, for logs."""
    shown = [f"step {line['step'] + 1}/{steps}", f"loss {line['loss']:.4f}"]
    shown += [f"{name} {line[name]:.4g}" for name in ("mtp_loss", "balance_loss", "grad_norm", "lr") if name in line]
    return "  ".join([*shown, f"{line['tokens_per_s']:,.0f} tokens/s", f"{line['time_step_s']:.1f} s"])
