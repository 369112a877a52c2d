"""What the commands do with a checked config: train, and each half of a step alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rewards.load import RewardError, load_reward
from rlzero import interrupt, run_folder
from rlzero.cluster.actors import TrainerDied
from rlzero.config.read import UsageError
from rlzero.config.rl import Config
from rlzero.data import dump
from rlzero.data.prompts import load_prompts, load_tokenizer
from rlzero.report.display import Display
from rlzero.report.log import RunLog
from rlzero.rl import loop
from rlzero.rl.groups import Group, grade, to_samples
from rlzero.rl.rollouts import Stopped
from rlzero.rl.run import Run, checkpoints, policy_options
from trainer.checkpoint import checkpoint
from trainer.trainer import Trainer

RESUMES = 3  # times that a run goes on by itself after its trainer died


def train(config: Config, resume: bool | str) -> None:
    """The whole run. A trainer that dies ends in a resume from the newest checkpoint; a signal saves and raises
    `interrupt.Interrupted`. Raises `UsageError` where a run of that name is there already and `resume` is not asked
    for, and what `run_folder.claimed` does."""
    check_rewards(config)
    with run_folder.claimed(config.run_dir, resume) as newest, Display(config) as watch:
        if newest is None:
            RunLog(config.run_dir).rewind(0, evaluations=False)  # of a run killed before its first checkpoint
        elif newest.name == f"step-{config.steps:06d}":
            watch(f"the run has all its {config.steps} steps already", {})
            return
        for attempt in range(RESUMES + 1):
            try:
                asyncio.run(_train(config, newest is not None, watch))
                return
            except TrainerDied as error:
                newest = checkpoint.latest(checkpoints(config.run_dir))
                if attempt == RESUMES or newest is None:
                    raise
                watch(f"{error}; going on from {newest.name}", {})


async def _train(config: Config, resume: bool, watch: Display) -> None:
    loop_here = asyncio.get_running_loop()
    async with Run(config, resume=resume, watch=watch) as run:
        try:
            with interrupt.graceful(lambda number: loop_here.call_soon_threadsafe(run.stop, number)):
                try:
                    await loop.train(run)
                except Stopped:
                    await run.save(run.step)
        except TrainerDied as error:
            if run.stopping:  # nothing is left that could save
                raise interrupt.Interrupted(run.stopping) from error
            raise
        if run.stopping and run.step < config.steps:
            watch(f"stopped before step {run.step + 1}; `rlzero train ... --resume` goes on", {})
            raise interrupt.Interrupted(run.stopping)


def generate(config: Config, path: Path, resume: bool, steps: int = 1) -> list[Group]:
    """Writes and scores the completions of the run's next `steps` steps with one policy, and saves them to `path`. The
    run's own folder is read only, so that its training may go on meanwhile."""
    check_rewards(config)

    async def write() -> list[Group]:
        with Display(config) as watch:
            async with Run(config, resume=resume, watch=watch, records=False) as run:
                groups: list[Group] = []
                for step in range(run.step, run.step + steps):
                    groups += (await loop.collect(run, step)).groups
                policy = str(run.start_from or config.policy.path)
                dump.save(path, groups, config.rewards, step=run.step, policy=policy)
                return groups

    return asyncio.run(write())


def train_from_dump(config: Config, path: Path, resume: bool) -> dict[str, float]:
    """One training step, in this process, on the groups of a dump; returns its metrics and saves nothing."""
    graded = grade(dump.load(path), config.rewards, config.algorithm, config.rollout.max_tokens)
    trainer = Trainer(
        policy_options(config, load_tokenizer(config.policy.path)), config.optimizer, config.loss,
        seed=config.seed, threads=config.threads, device=config.device,
    )  # fmt: skip
    if resume:
        newest = checkpoint.latest(checkpoints(config.run_dir))
        if newest is None:
            raise UsageError(f"{config.run_dir}: has no checkpoint to take the weights from; leave out --resume")
        trainer.load(newest)
    return trainer.step(loop.minibatches(to_samples(graded, config.algorithm), config))


def check(config: Config) -> None:
    """What a run reads before it starts anything: rewards, tokenizer, data. Raises `UsageError`."""
    check_rewards(config)
    tokenizer = load_tokenizer(config.policy.path)
    for part in ("train", "evaluation") if config.data.evaluation else ("train",):
        load_prompts(config, tokenizer, part)


def check_rewards(config: Config) -> None:
    """Loads every reward once, before anything starts. Raises `UsageError` that lists those that do not load."""
    problems = []
    for spec in config.rewards:
        try:
            load_reward(spec.fn, spec.params)
        except RewardError as error:
            problems.append(f"  - {error}")
        except Exception as error:  # importing a reward runs somebody's code
            problems.append(f"  - {spec.fn}: importing it raised {type(error).__name__}: {error}")
    if problems:
        raise UsageError("\n".join(["rewards that cannot be used:", *problems]))
