"""What stands in a run's folder, read as text that anybody may have written: damaged lines are counted and left out, a
string where a number belongs is no number."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Numbers = dict[str, float]  # one line of metrics: names and finite numbers, `step` among them


@dataclass(frozen=True)
class Completion:
    """One completion as `RunLog.samples` wrote it; `rewards` are (name, value, verdict, reason) of each reward."""

    text: str
    verdict: str
    reward: float | None
    tokens: float | None
    rewards: Sequence[tuple[str, float | None, str, str]]


@dataclass(frozen=True)
class Question:
    """A prompt of step `step` with the row's other columns (the gold answer among them) and some of its completions."""

    step: int
    prompt: str
    columns: dict[str, str]
    completions: Sequence[Completion]


@dataclass(frozen=True)
class RunRecord:
    """A run's files. Of lines for one step the last counts; `damaged` maps a file's name to its unreadable lines."""

    name: str
    config: dict[str, Any]
    config_text: str
    steps: list[Numbers]
    evaluations: list[Numbers]
    samples: list[Question]
    evaluation_samples: list[Question]
    damaged: dict[str, int]


def read_run(folder: Path) -> RunRecord:
    """The record of the run in `folder`; what is not there is empty."""
    file = folder / "config.yaml"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    damaged: dict[str, int] = {}

    def lines(name: str) -> list[dict[str, Any]]:
        found = _lines(folder / name)
        good = [line for line in found if isinstance(line, dict) and number(line.get("step")) is not None]
        if len(good) < len(found):
            damaged[name] = len(found) - len(good)
        return good

    def numbers(name: str) -> list[Numbers]:
        by_step = {line["step"]: {str(k): v for k, v in line.items() if number(v) is not None} for line in lines(name)}
        return [by_step[step] for step in sorted(by_step)]

    return RunRecord(
        name=str(config.get("name", folder.resolve().name)),
        config=config,
        config_text=text,
        steps=numbers("metrics.jsonl"),
        evaluations=numbers("evals.jsonl"),
        samples=[_question(line) for line in lines("samples.jsonl")],
        evaluation_samples=[_question(line) for line in lines("eval_samples.jsonl")],
        damaged=damaged,
    )


def number(value: Any) -> float | None:
    """`value` where it is a finite number of a size that can be drawn, else None."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100  # NaN never does
    return value if fits and math.isfinite(value) else None


def _lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file; None for a line that is none."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            found.append(None)
    return found


def _question(line: dict[str, Any]) -> Question:
    prompt, columns = line.get("prompt"), line.get("row")
    if isinstance(prompt, list):  # a conversation
        prompt = "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in prompt)
    columns = {str(k): str(v) for k, v in columns.items()} if isinstance(columns, dict) else {}
    return Question(int(line["step"]), str(prompt), columns, [_completion(c) for c in _dicts(line.get("completions"))])


def _completion(fields: dict[str, Any]) -> Completion:
    scores = _dicts(fields.get("scores"))
    rewards = [
        (str(s.get("reward", "")), number(s.get("value")), str(s.get("verdict", "")), str(s.get("detail", "")))
        for s in scores
    ]
    verdict = fields.get("verdict") or "not scored"
    return Completion(
        str(fields.get("text")), str(verdict), number(fields.get("reward")), number(fields.get("tokens")), rewards
    )


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
