"""One run: its folder, its data, its actors, and the state that a checkpoint keeps."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rewards.workers.runner import RewardRunner
from rlzero.cluster.engines import EnginePool
from rlzero.cluster.placement import engine_gpus, on_gpus
from rlzero.cluster.ray_cluster import Cluster
from rlzero.cluster.weight_sync import WeightSync
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.data.prompts import PromptStream, load_prompts, load_tokenizer
from rlzero.eval import evaluate
from rlzero.plan import of_run as plan
from rlzero.report.log import RunLog
from rlzero.rl.diagnosis import diagnose
from rlzero.rl.groups import Graded, Group
from rlzero.rl.metrics import RolloutStats, staleness
from rlzero.rl.rollouts import Writer
from rollout import probe
from rollout.engine import Sampling
from rollout.worker import choose_engine
from trainer.checkpoint import checkpoint
from trainer.checkpoint.model_folder import model_fields, switches, text_end, text_fields
from trainer.policy import PolicyOptions

logger = logging.getLogger(__name__)

EXPLODED_NATS = 200.0  # a policy that is so much surer of the wrong token is no policy any more


class RunError(RuntimeError):
    """The run cannot go on; the message says what was found and what to do. Exit code 1."""


class Run:
    """Owns everything a run starts and everything it keeps. An async context manager: on leaving, every process is
    gone. `resume` goes on from the newest checkpoint of the run's folder. Without `records` it writes nothing there and
    evaluates nothing."""

    def __init__(
        self,
        config: Config,
        resume: bool,
        watch: Callable[[str, dict], None] = lambda event, data: None,
        records: bool = True,
    ):
        self.config, self.watch = config, watch
        self.gpu = plan.gpu_of(config)
        if self.gpu is not None and (why := plan.shortage(config, self.gpu)):
            raise UsageError(why)
        self.sleep_level = plan.sleep_level(config)  # of engines while the trainer works; 0: nobody ever sleeps
        self.dir = config.run_dir
        self.step = 0  # the next step to train
        self.stopping = 0  # the signal that asked the run to end
        self.tokenizer = load_tokenizer(config.policy.path)
        self.prompts = PromptStream(load_prompts(config, self.tokenizer, "train"), config.seed)
        evaluates = records and config.data.evaluation is not None
        self.held_out = load_prompts(config, self.tokenizer, "evaluation") if evaluates else None
        self.policy = policy_options(config, self.tokenizer)
        fields, special = model_fields(config.policy.path), self.tokenizer.all_special_ids
        vocabulary = min(len(self.tokenizer), text_fields(fields).get("vocab_size", len(self.tokenizer)))
        self.probe = probe.probe_sequences(vocabulary, without=special)
        # asked once: which way an engine goes past a window does not change with its weights
        self.far = probe.far_sequences(switches(fields), self.policy.longest, vocabulary, without=special)
        self.start_from = checkpoint.latest(checkpoints(self.dir)) if resume else None
        self.log = RunLog(self.dir, config.tracking, config.resolved()) if records else None
        self.writer: Writer | None = None
        self._evaluated = -1  # the last step before which an evaluation was, if it was due
        self._published = asyncio.Condition()  # a version, or an evaluation
        self._writing: asyncio.Task | None = None  # collects the groups of coming steps
        self._taken_from: deque[tuple[int, dict]] = deque(maxlen=config.staleness + 2)  # data position before a step
        self._written: dict[int, RolloutStats] = {}
        self._step_metrics: dict[str, float] = {}
        self._step_began_s = time.monotonic()
        self._first_mean: float | None = None  # log-probability of a token of the probe, when the run began

    # --- start and end -----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Run:
        config = self.config
        if self.log is not None:
            (self.dir / "config.yaml").write_text(config.resolved_yaml())
        self.rewards = RewardRunner(
            config.rewards, workers=config.reward_workers, max_error_share=config.max_reward_error_rate
        )
        self.cluster = Cluster(config)
        try:
            kind, reason = engine(config)
            self.watch(f"engine: {kind} ({reason})", {})
            placed = self.cluster.placement
            self.watch(f"placement: {placed.choice.kind} ({placed.choice.reason}), {placed.choice.transport}", {})
            self.cluster.__enter__()
            self.trainer = self.cluster.trainer(
                self.policy, config.optimizer, config.loss,
                seed=config.seed, device="cuda" if on_gpus(config) else "cpu", parallel=config.parallel,
            )  # fmt: skip
            if placed.shares_gpus:  # an engine takes what it finds free, and does not bear that it changes meanwhile
                await self._open_trainer()
                await self.trainer.call("release")
            folder = str(self.start_from or config.policy.path)
            planned = {"sleep_level": self.sleep_level, **plan.engine_options(config, kind)}
            self.pool = EnginePool(self.cluster, kind, folder, engine_options(config, kind, planned))
            self.weight_sync = WeightSync(config, kind, placed, self.trainer, self.pool, self.sleep_level)
            self.writer = Writer(self.pool, self.rewards, self.weight_sync)
            if self.start_from is not None and not placed.shares_gpus:
                await self._open_trainer()  # awaited first: it knows best what is wrong with a checkpoint
            await asyncio.gather(self.trainer.ready(config.cluster.deadline_s), self.pool.ready())
            await self.publish(version=self.step)
            self._step_began_s = time.monotonic()  # the start is no part of the first step
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _open_trainer(self) -> None:
        """Returns once the trainer has its policy; in a resumed run, once all is as the checkpoint says."""
        await self.trainer.ready(self.config.cluster.deadline_s)
        if self.start_from is not None:
            self._restore(await self.trainer.call("load", str(self.start_from)))

    async def __aexit__(self, *_: object) -> None:
        if self._writing is not None:
            self._writing.cancel()
        if self.writer is not None:
            self.writer.close()
        self.rewards.close()
        self.cluster.__exit__()

    def stop(self, number: int) -> None:
        """Asks the run to end because of signal `number`: at once where nothing is lost, else after the update in
        flight, whose boundary is saved."""
        self.stopping = number
        self.watch(f"stopping ({signal.Signals(number).name})", {"step": self.step})
        self.writer.stop()

    def error(self, message: str) -> RunError:
        return RunError(message)

    # --- writing and scoring -----------------------------------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(rollout.max_tokens, rollout.temperature, stop=rollout.stop, seed=self.config.seed)

    async def write(self, tag: str, count: int) -> list[Group]:
        """`count` complete and scored groups for training. With rollout.oversample above 1 they are the first ones of
        more that are being written; the others are carried over to the next call."""
        opened = math.ceil(count * self.config.rollout.oversample)
        prompts = self.prompts.take(max(0, opened - len(self.writer.carried)))
        groups = await self.writer.first(count, tag, prompts, self.config.batch.group_size, self.sampling)
        self.prompts.used(group.prompt for group in groups)
        return groups

    async def ahead(self, collect: Callable[[int], Awaitable[Graded]]) -> AsyncIterator[Graded]:
        """What `collect(step)` returns, step by step. The collection of step t starts once the policy has version
        t - staleness; with staleness 0 also the evaluation before it is over, so that what runs together in an engine
        does not depend on time. One collection at a time."""
        ready: asyncio.Queue[Graded] = asyncio.Queue()
        staleness = self.config.staleness

        def may_begin(step: int) -> bool:
            return self.version >= step - staleness and (staleness > 0 or self._evaluated >= step)

        async def produce() -> None:
            for step in range(self.step, self.config.steps):
                async with self._published:
                    await self._published.wait_for(lambda step=step: may_begin(step))
                self._taken_from.append((step, self.prompts.state_dict()))
                await ready.put(await collect(step))

        self._writing = asyncio.create_task(produce())
        for _ in range(self.step, self.config.steps):
            graded = asyncio.create_task(ready.get())
            await asyncio.wait({graded, self._writing}, return_when=asyncio.FIRST_COMPLETED)
            if not graded.done() and self._writing.done():
                graded.cancel()
                self._writing.result()  # raises what stopped the writing
            yield await graded

    # --- weights -----------------------------------------------------------------------------------------------------

    async def make_room(self) -> None:
        """Called before the trainer works; `publish` ends it. Synchronous runs take turns: what is still being written
        is interrupted. From here on the weights are those of no version."""
        if not self.config.staleness:
            self._step_metrics["interrupted_tokens"] = float(await self.writer.pause())
        await self.weigh()
        await self.weight_sync.trainer_begins()

    async def publish(self, version: int) -> None:
        """Hands the trainer's weights to every engine and compares log-probabilities on the probe: that alone sees
        what an engine derived or repacked from them. What may be written now waits for that: the probe would stand
        behind the prompts of a whole step."""
        await self.weigh()
        await self.weight_sync.update_engines(version)
        await self.check_agreement(version)
        async with self._published:
            self._published.notify_all()

    @property
    def version(self) -> int:
        """Of the policy that the engines hold; -1 before the first."""
        return self.weight_sync.version

    async def weigh(self) -> None:
        """Into the step's metrics: the most memory that trainer, engines and the trainer's GPU held, beside what was
        planned. Called when either has just worked and gave nothing back."""
        if self.gpu is None:
            return
        found = {f"memory_trainer_{k}_bytes": v for k, v in (await self.trainer.call("memory")).items()}
        found["memory_device_bytes"] = found.pop("memory_trainer_device_bytes", 0)
        if not self.config.staleness:  # an engine that writes would let the step wait
            found["memory_engine_reserved_bytes"] = max(a.get("reserved", 0) for a in await self.pool.memory())
        for name, value in found.items():
            self._step_metrics[name] = max(float(value), self._step_metrics.get(name, 0.0))
        self._step_metrics["memory_planned_bytes"] = float(self.gpu.on_trainer)

    async def check_agreement(self, version: int) -> None:
        """Raises `RunError` where an engine's log-probabilities on the probe are further from the trainer's than
        rollout.max_gap allows."""
        temperature, sequences = self.config.rollout.temperature, [*self.probe, *self.far.values()]
        trained, scores = await asyncio.gather(
            self.trainer.call("score", sequences, temperature), self.weight_sync.score(sequences, temperature)
        )
        self._check_weights(version, float(np.mean(np.concatenate(trained))))
        for worker, written in zip(self.pool.workers, scores, strict=True):
            gap = probe.worst_logprob_diff(written, trained, self.far)
            self._step_metrics["sync_gap"] = max(gap["mean_abs"], self._step_metrics.get("sync_gap", 0.0))
            if not gap["mean_abs"] <= self.config.rollout.max_gap:
                raise RunError(
                    f"{worker.name} and the trainer disagree about policy version {version}: mean |delta logprob| "
                    f"{gap['mean_abs']:.3g} on the probe, rollout.max_gap is {self.config.rollout.max_gap:g}. Training "
                    "on such rollouts would be off-policy without saying so. Check that both use the same dtype, and "
                    "the engine's release (README, supported versions)"
                )
        self.far = {}

    def _check_weights(self, version: int, mean: float) -> None:
        """Raises `RunError` where an update has left a policy that nothing can be made of, before it is saved. `mean`:
        its log-probability of a token of the probe, nats."""
        if self._first_mean is None:
            self._first_mean = mean
        if not mean > 10 * self._first_mean - EXPLODED_NATS:
            raise RunError(
                f"step {version}: the update has destroyed the weights: a token of the probe has a log-probability of "
                f"{mean:.3g}, {self._first_mean:.3g} when the run began. Nothing of it is saved; lower optimizer.lr "
                f"({self.config.optimizer.lr:g}) and go on with --resume"
            )

    async def refresh_reference(self, step: int) -> None:
        """The reference model becomes the policy every `algorithm.reference_refresh_steps` steps."""
        every = self.config.algorithm.reference_refresh_steps
        if self.config.loss.kl_coef and every and step % every == 0:
            await self.trainer.call("refresh_reference")

    # --- records -----------------------------------------------------------------------------------------------------

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Adds the seconds spent inside to this step's `time_<part>_s`."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            name = f"time_{part}_s"
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + time.monotonic() - start_s

    def count(self, step: int, graded: Graded) -> None:
        """What came of one sampling round, before zero-variance groups are dropped."""
        if step == 0 and step not in self._written and (why := diagnose(graded.groups, self.config, training=True)):
            self.watch(why, {})
        written = self._written.setdefault(step, RolloutStats())
        written.rounds.append(graded)
        written.partial = len(self.writer.carried)

    def record(self, step: int, graded: Graded, metrics: dict[str, float]) -> None:
        """Writes the step's line of metrics and what the policy wrote. From here on the next step is `step + 1`."""
        self.step = step + 1
        line = {"step": step, **self._written.pop(step).metrics(self.config.rewards), **metrics}
        line |= staleness(graded.groups, trained_version=step) | self.pool.shares()
        line |= self._step_metrics | {"worker_restarts": self.pool.restarts, "policy_version": self.version}
        line["time_step_s"] = time.monotonic() - self._step_began_s
        self._step_metrics, self._step_began_s = {}, time.monotonic()
        self.log.metrics(line)
        self.log.samples(step, graded.groups[0], self.config.rewards)
        self.watch("step", line)

    # --- evaluation --------------------------------------------------------------------------------------------------

    async def evaluate(self, step: int) -> None:
        """pass@1 and cons@k on the held-out questions: before the first step, after the last, and every
        `evaluation.every` steps between."""
        options = self.config.evaluation
        due = step in (0, self.config.steps) or (options.every and step % options.every == 0)
        if self.held_out is not None and due and step not in self.log.evaluated:
            await self._evaluate(step)
        async with self._published:
            self._evaluated = step
            self._published.notify_all()

    async def _evaluate(self, step: int) -> None:
        began_s, questions, samples = time.monotonic(), list(self.held_out), self.config.evaluation.samples
        groups = await self.writer.all(evaluate.tag(step), questions, samples, evaluate.sampling(self.config))
        result = evaluate.summarise(groups, self.config.rewards)
        self.log.evaluation({"step": step, **result, "time_s": time.monotonic() - began_s})
        self.log.evaluation_samples(step, groups, self.config.rewards)
        self.watch("evaluation", {"step": step, **result})
        self._step_began_s = time.monotonic()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    async def save(self, step: int) -> None:
        """A checkpoint of the boundary before step `step`, if one is due: on the schedule, at the end, on Ctrl-C."""
        self.step = step
        every = self.config.checkpoint.every
        if not (self.stopping or step == self.config.steps or (every and step % every == 0)):
            return
        taken = next((state for at, state in self._taken_from if at == step), self.prompts.state_dict())
        state = {"step": step, "prompts": taken, "name": self.config.name}
        with self.clock("save"):
            await self.trainer.call("save", str(checkpoints(self.dir) / f"step-{step:06d}"), state)
            checkpoint.keep_last(checkpoints(self.dir), self.config.checkpoint.keep)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.prompts.load_state_dict(state["prompts"])
        if self.log is not None:
            self.log.rewind(self.step)


def engine(config: Config) -> tuple[str, str]:
    """The engine that writes and the reason for it. Raises `UsageError` where the one asked for cannot run here."""
    try:
        return choose_engine(config.rollout.engine, engine_gpus(config) if on_gpus(config) else 0)
    except RuntimeError as error:
        raise UsageError(f"rollout.engine: {error}") from error


def policy_options(config: Config, tokenizer: Any) -> PolicyOptions:
    """What the trainer is told of the policy: the config's options, the run's longest sequence and what ends a text."""
    end = text_end(config.policy.path or "", tokenizer)
    if end.differ:
        logger.warning("what ends a text differs: %s", end.describe(tokenizer))
    return config.policy.model_copy(update={"longest": plan.context(config), "end_tokens": end.ids})


def engine_options(config: Config, kind: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Options of every engine: the config's own, over what is `planned` for an engine beside a trainer."""
    options = {"dtype": config.policy.dtype, "seed": config.seed, "max_context": plan.context(config), **planned}
    if kind == "vllm" and engine_gpus(config) > 1:
        # Else vLLM, which sees that it runs in a placement group of Ray's, looks there for GPUs of its own.
        options["distributed_executor_backend"] = "mp"
    return {**options, **config.rollout.engine_args}


def checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints"
