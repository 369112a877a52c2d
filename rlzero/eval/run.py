"""`rlzero eval`: the held-out questions of a config, answered by the rollout workers of a run without its trainer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rewards.workers.runner import RewardRunner
from rlzero.cluster.engines import Fleet
from rlzero.cluster.ray_cluster import Cluster
from rlzero.config.rl import Config
from rlzero.data import dump
from rlzero.data.prompts import load_prompts, load_tokenizer
from rlzero.eval import evaluate
from rlzero.rl.groups import Group
from rlzero.rl.rollouts import Writer
from rlzero.rl.run import engine, engine_options


def run(config: Config, output: Path | None = None, say: Callable[[str], None] = lambda line: None) -> list[Group]:
    """The scored groups of the held-out questions, answered by `policy.path`; see `evaluate.summarise` for figures.

    Questions, sampling and noise are those of an evaluation inside a run: of a run's checkpoint the figures are the
    ones that the run wrote. `rollout.workers` engines share the questions out, each on GPUs of its own where there are
    any. `output` gets every completion with its scores, a question as soon as it is scored. Raises `UsageError` and
    `ClusterError`.
    """
    prompts = list(load_prompts(config, load_tokenizer(config.policy.path), "evaluation"))
    kind, reason = engine(config)
    say(f"engine: {kind} ({reason})")
    with nullcontext() if output is None else dump.writing(output, config.rewards, policy=config.policy.path) as write:
        return asyncio.run(_answer(config, kind, prompts, write))


async def _answer(config: Config, kind: str, prompts: list, write: Callable[[Group], None] | None) -> list[Group]:
    rewards = RewardRunner(
        config.rewards, workers=config.reward_workers, max_error_share=config.max_reward_error_rate
    )
    with rewards, Cluster(config, trainer=False) as cluster:
        pool = Fleet(cluster, kind, str(config.policy.path), engine_options(config, kind, {}))
        await pool.ready()
        writer = Writer(pool, rewards, scored=write)
        try:
            tag = evaluate.tag(_steps_of(Path(config.policy.path)))
            return await writer.all(tag, prompts, config.evaluation.samples, evaluate.sampling(config))
        finally:
            writer.close()


def _steps_of(folder: Path) -> int:
    """Steps that a run's checkpoint has behind it; 0 of any other model."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else 0
