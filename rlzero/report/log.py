"""What a run leaves behind line by line: metrics, evaluations and samples as JSON lines, mirrored to trackers.

    runs/<name>/metrics.jsonl   one object a step: step, reward_mean, length_mean, kl_reference, time_train_s, ...
    runs/<name>/evals.jsonl     one object an evaluation: step, pass_at_1, cons_at_k, n, ...
    runs/<name>/samples.jsonl   one object a step: a question with a few of its completions and what rewards said
    runs/<name>/eval_samples.jsonl   as many of an evaluation: the same questions every time

A line is complete or absent: one that a kill cut short is dropped when the file is next read.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from rewards.json_form import dumps
from rlzero.config.read import UsageError
from rlzero.config.rl import Reward
from rlzero.eval.evaluate import judge
from rlzero.rl.groups import Group, weighted

logger = logging.getLogger(__name__)

SAMPLES_KEPT = 4  # completions of a group
QUESTIONS_KEPT = 4  # of an evaluation
TEXT_KEPT = 6_000  # characters of a completion, half from its start and half from its end
REASON_KEPT = 600  # of a reward's reason and of a column


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The files of one run. `tracking` names what mirrors them: tensorboard, wandb, trackio; they get the `config`, the
    run's own as plain values, too."""

    def __init__(self, run_dir: Path, tracking: Sequence[str] = (), config: dict[str, Any] | None = None):
        self.dir = Path(run_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            _mend(self.dir / name)
        self._tracking, self._config = tuple(tracking), config
        self._trackers: list[Tracker] | None = None
        for name in self._tracking:
            _require(name)

    @property
    def evaluated(self) -> set[int]:
        """Steps whose evaluation is on file."""
        return {line["step"] for line in read_lines(self.dir / "evals.jsonl")}

    def metrics(self, line: dict[str, Any]) -> None:
        """Appends a step's metrics; `line["step"]` is the step."""
        _append(self.dir / "metrics.jsonl", line)
        self._mirror(line, prefix="")

    def evaluation(self, line: dict[str, Any]) -> None:
        """Appends the figures of an evaluation before step `line["step"]`."""
        _append(self.dir / "evals.jsonl", line)
        self._mirror(line, prefix="evaluation/")

    def samples(self, step: int, group: Group, rewards: Sequence[Reward]) -> None:
        """Appends a question of a step, the first of its completions, and what every reward said of them."""
        _append(self.dir / "samples.jsonl", {"step": step, **sample_of(group, rewards)})

    def evaluation_samples(self, step: int, groups: Sequence[Group], rewards: Sequence[Reward]) -> None:
        """Appends the first questions of an evaluation in the same way."""
        for group in groups[:QUESTIONS_KEPT]:
            _append(self.dir / "eval_samples.jsonl", {"step": step, **sample_of(group, rewards)})

    def rewind(self, step: int, evaluations: bool = True) -> None:
        """Takes out what was written for steps that the run, resumed at `step`, will do again. The evaluation of the
        boundary `step` itself stays, for it was made before the checkpoint, unless `evaluations` is False."""
        for name in FILES:
            path = self.dir / name
            lines = read_lines(path)
            kept = [
                line
                for line in lines
                if line["step"] < step or (evaluations and name in OF_EVALUATIONS and line["step"] == step)
            ]
            if len(kept) < len(lines):
                _rewrite(path, kept)
        self._restart_trackers(step)

    def close(self) -> None:
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None

    def _mirror(self, line: dict[str, Any], prefix: str) -> None:
        if self._trackers is None:
            self._restart_trackers(purge_step=None)
        numbers = {prefix + k: float(v) for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self._trackers or ():
            tracker.log(numbers, line["step"])

    def _restart_trackers(self, purge_step: int | None) -> None:
        self.close()
        self._trackers = [
            _TensorBoard(self.dir / "tensorboard", purge_step, self._config)
            if name == "tensorboard"
            else _Wandb(name, self.dir, self._config)
            for name in self._tracking
        ]


OF_EVALUATIONS = ("evals.jsonl", "eval_samples.jsonl")
FILES = ("metrics.jsonl", "samples.jsonl", *OF_EVALUATIONS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that a run wrote; an absent file has none, a line cut short is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = [line for line in text.split("\n") if line]
    if text and not text.endswith("\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: is damaged ({error}); delete that line and go on") from error
    return found


class _TensorBoard:
    def __init__(self, folder: Path, purge_step: int | None, config: dict[str, Any] | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        if config is not None:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.split("\n")))  # Markdown: as it is

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """wandb, and trackio, which keeps the same interface."""

    def __init__(self, module: str, run_dir: Path, config: dict[str, Any] | None):
        self._module = importlib.import_module(module)
        inside = {"dir": str(run_dir)} if module == "wandb" else {}  # else it writes beside the caller's files
        self._module.init(project="rlzero", name=run_dir.name, config=config, **inside)

    def log(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


def _require(tracker: str) -> None:
    if tracker != "tensorboard" and importlib.util.find_spec(tracker) is None:
        raise UsageError(
            f"tracking: {tracker} is named in the config but not installed; in the repository, `pip install "
            "'.[tracking]'`, or take it out of tracking"
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(dumps(line) + "\n")


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _mend(path: Path) -> None:
    """Drops a last line that was cut short, so that the next one does not grow on it."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            logger.warning("%s: the last line was cut short and is dropped", path)
            os.truncate(path, data.rfind(b"\n") + 1)


def sample_of(group: Group, rewards: Sequence[Reward]) -> dict[str, Any]:
    """A question with its row's other columns, the first of its completions, and each reward's word on them."""
    completions = []
    for rollout, scores in list(zip(group.rollouts, group.scores, strict=True))[:SAMPLES_KEPT]:
        decides = judge(scores, rewards)
        said = [
            {"reward": r.fn, "value": s.value, "verdict": s.verdict, "detail": _shorten(s.detail, REASON_KEPT)}
            for s, r in zip(scores, rewards, strict=True)
            if s is not None
        ]
        completions.append({
            "text": _shorten(rollout.text), "tokens": len(rollout.tokens), "finish_reason": rollout.finish_reason,
            "verdict": decides.verdict if decides else None, "reward": weighted(scores, rewards), "scores": said,
        })  # fmt: skip
    row = group.prompt.row
    columns = {name: _shorten(str(value), REASON_KEPT) for name, value in row.items() if name != "prompt"}
    return {"prompt": row.get("prompt") or group.prompt.text, "row": columns, "completions": completions}


def _shorten(text: str, kept: int = TEXT_KEPT) -> str:
    if len(text) <= kept:
        return text
    return f"{text[: kept // 2]}\n[... {len(text) - kept} characters left out ...]\n{text[-kept // 2 :]}"
