"""What a script or a notebook calls: `from rlzero import train, evaluate, score`. The commands do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rewards.load import RewardSpec, load_reward
from rewards.score import Score
from rlzero.config.rl import Config

T = TypeVar("T")
Source = Config | Mapping[str, Any] | str | Path  # a config, its fields as nested dicts, or its YAML file


def train(config: Source, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """A whole run of reinforcement learning; returns its summary (see `rlzero.report.html.summary`) and leaves
    `report.html` and checkpoints in the run's folder. `overrides` are `a.b=c` as for the command. Raises `UsageError`
    for what somebody has to mend, `RunError` where a run cannot go on."""
    from rlzero import launch
    from rlzero.report.html import summary, write_report

    settings = _config(config, overrides)
    _outside_of_a_loop(lambda: launch.train(settings, resume))
    write_report(settings.run_dir)
    return summary(settings.run_dir)


def evaluate(
    config: Source, *overrides: str, policy: str | Path | None = None, output: str | Path | None = None
) -> dict[str, float]:
    """pass@1, pass@k, cons@k and the like (see `rlzero.eval.evaluate.figures`) of the config's held-out questions,
    answered by `policy`, a model, checkpoint or run, or else by policy.path; `output` gets every completion."""
    from rlzero import launch
    from rlzero.eval import run
    from rlzero.eval.evaluate import summarise
    from rlzero.stages.export import find_checkpoint

    changes = [*overrides] if policy is None else [*overrides, f"policy.path={find_checkpoint(policy)}"]
    settings = _config(config, changes)
    launch.check_rewards(settings)
    groups = _outside_of_a_loop(lambda: run.run(settings, Path(output) if output is not None else None))
    return summarise(groups, settings.rewards)


def score(
    completions: str | Sequence[str], reward: str | Mapping[str, Any] | Callable, **row: Any
) -> Score | None | list[Score | None]:
    """What `reward` (an address, an entry of a config's `rewards`, or the function itself) says of one completion, or
    of each of a group, for a row with the columns `row`. In this process, without deadlines; exceptions
    come through."""
    if callable(reward):
        from rewards.load import Reward

        loaded = Reward(getattr(reward, "__name__", repr(reward)), reward, {})
    else:
        spec = RewardSpec.of(reward)
        loaded = load_reward(spec.fn, spec.params)
    return loaded.one(completions, row) if isinstance(completions, str) else loaded.group(completions, row)


def _config(source: Source, overrides: Sequence[str]) -> Config:
    if isinstance(source, Config):
        source = source.resolved()
    return Config.load(source, overrides)


def _outside_of_a_loop(work: Callable[[], T]) -> T:
    """What `work()` returns. A notebook runs an event loop in its main thread, and `work` starts its own: then it runs
    in another thread, which is waited for."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    answer: list[Any] = [None, None]

    def guarded() -> None:
        try:
            answer[0] = work()
        except BaseException as error:
            answer[1] = error

    thread = threading.Thread(target=guarded, name="rlzero")
    thread.start()
    thread.join()
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
