"""A run with slow engines that says what it trained on: `python -m tests.rlzero.recorded_run CONFIG` starts it or goes
on with it.

Every step adds a line to `trained.jsonl` before its checkpoint is saved, so that after a kill a step may stand there
twice; the last line of a step counts. At the end `unused.json` holds the ids of prompts that were taken and not used.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from rlzero.cluster.ray_cluster import Cluster
from rlzero.config.rl import Config
from rlzero.rl import loop
from rlzero.rl import run as run_module
from rlzero.rl.groups import Graded
from rlzero.rl.run import Run, checkpoints
from rollout.worker import RolloutWorker
from trainer.checkpoint import checkpoint

STEP_S = 0.01  # what every step of a slow engine takes longer than its computation


class SlowWorker(RolloutWorker):
    """A worker on a slow device."""

    def __init__(self, *args: Any, step_s: float = STEP_S, **kwargs: Any):
        super().__init__(*args, **kwargs)

        def slow_down(engine: Any) -> None:
            step = engine._step
            engine._step = lambda: (time.sleep(step_s), step())

        self._engine.call(slow_down).result()


class SlowCluster(Cluster):
    """Every step of worker i takes `step_s(i)` longer."""

    def step_s(self, index: int) -> float:
        return STEP_S

    def start(self, cls: type, where: Any, name: str, args: tuple, kwargs: dict[str, Any], *more: Any) -> Any:
        if cls is RolloutWorker:
            cls, kwargs = SlowWorker, {**kwargs, "step_s": self.step_s(int(name.split()[-1]))}
        return super().start(cls, where, name, args, kwargs, *more)


class RecordedRun(Run):
    """Keeps, step by step, the groups that were trained on, and notes their prompts in the run's folder."""

    def __init__(self, config: Config, resume: bool = False):
        super().__init__(config, resume=resume)
        self.trained: dict[int, Graded] = {}
        self.written: list[str] = []  # ids of the prompts of all groups, those that were dropped again included

    def count(self, step: int, graded: Graded) -> None:
        self.written += [group.prompt.id for group in graded.groups]
        super().count(step, graded)

    def record(self, step: int, graded: Graded, metrics: dict[str, float]) -> None:
        self.trained[step] = graded
        with (self.dir / "trained.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "prompts": [group.prompt.id for group in graded.groups]}) + "\n")
        super().record(step, graded, metrics)

    def unused(self) -> list[str]:
        """Ids of the prompts that belong to groups which are still open, or wait to be opened again."""
        return [self.prompts._at(position).id for position in self.prompts.state_dict()["unused"]]

    def taken(self) -> list[str]:
        """Ids of all prompts handed out since the run began."""
        return [self.prompts._at(position).id for position in range(self.prompts.position)]


async def train(path: Path) -> None:
    config = Config.load(path)
    resume = checkpoint.latest(checkpoints(config.run_dir)) is not None
    async with RecordedRun(config, resume) as run:
        await loop.train(run)
        (run.dir / "unused.json").write_text(json.dumps({"unused": run.unused(), "taken": run.taken()}))


if __name__ == "__main__":
    run_module.Cluster = SlowCluster
    asyncio.run(train(Path(sys.argv[1])))
