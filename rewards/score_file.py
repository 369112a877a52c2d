"""Scores a JSON-lines file of completions on all cores; what `rlzero score` runs."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rewards.json_form import dumps, plain
from rewards.load import RewardError, RewardSpec, load_reward
from rewards.score import Score, Verdict
from rewards.workers.runner import RewardRunner, Scores

GROUP = 32  # lines handed to the runner together
VERDICTS: tuple[Verdict, ...] = ("correct", "wrong", "unparsed", "timeout", "error")


@dataclass
class RewardSummary:
    """What one reward said about a file. `confusion` counts (label, verdict is correct); errors are not in it."""

    fn: str
    weight: float
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*VERDICTS, "not applicable"), 0))
    mean_value: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, int] | None = None
    first_error: str = ""


@dataclass
class FileSummary:
    """Completions scored, seconds, a summary per reward, and what may be wrong with the question."""

    completions: int
    seconds: float
    rewards: list[RewardSummary]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Rewards that ended in an error for every completion."""
        return [r.fn for r in self.rewards if r.verdicts["error"] and r.verdicts["error"] == sum(r.verdicts.values())]

    def to_json(self) -> dict[str, Any]:
        """Plain data, NaN as null."""
        return plain({**asdict(self), "per_second": self.completions / max(self.seconds, 1e-9)})

    def __str__(self) -> str:
        rate = self.completions / max(self.seconds, 1e-9)
        lines = [f"{self.completions} completions in {self.seconds:.1f} s ({rate:,.0f}/s)"]
        for reward in self.rewards:
            counts = ", ".join(f"{name} {count}" for name, count in reward.verdicts.items() if count)
            lines.append(f"{reward.fn} (weight {reward.weight:g}): mean {reward.mean_value:.4f}; {counts or 'nothing'}")
            lines += [f"    {name} {value:.4g}" for name, value in sorted(reward.metrics.items())]
            if reward.confusion is not None:
                c = reward.confusion
                lines.append(
                    f"    label right: {c['right_correct']} rewarded, {c['right_missed']} not (false negatives)"
                )
                lines.append(
                    f"    label wrong: {c['wrong_rewarded']} rewarded (false positives), {c['wrong_refused']} not"
                )
            if reward.first_error:
                lines.append("    the first error: " + reward.first_error.strip().replace("\n", "\n    "))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def score_file(
    path: str | Path,
    rewards: Sequence[RewardSpec | str | Mapping[str, Any]],
    output: str | Path | None = None,
    *,
    workers: int | None = None,
    completion: str = "completion",
    label: str = "label",
    group: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FileSummary:
    """Scores every line of a JSON-lines file, or of a dump of `rlzero generate` or `eval`, and returns the summary.

    A line is an object with the column `completion` (a text, or a list of texts: the samples of one prompt, for the
    plural form of rewards) and whatever columns the rewards ask for by name. Lines with the same value in the column
    `group` are the samples of one prompt, and become one line of `output` in the place of the first. With a column
    `label` (true or false, 1 or 0, "correct" or "wrong"; a list where the completion is one) the summary tells the
    confusion against it. `output` gets one line per input line, in order: its number, the weighted sum, and value,
    verdict, metrics and detail per reward. `progress(done, total)` is called now and then, in completions. Raises
    RewardError for an unreadable line, a missing completion or an unloadable reward.
    """
    specs = [RewardSpec.of(spec) for spec in rewards]
    lines = _read(Path(path), completion, label)
    if group is not None:
        lines = _together(lines, group, path)
    total = sum(len(line.texts) for line in lines)
    summaries = [RewardSummary(spec.fn, spec.weight) for spec in specs]
    tally = _Tally(specs, summaries, any(line.labels is not None for line in lines))
    start, done, waiting = time.monotonic(), 0, dict[Any, list[_Line]]()
    ready: dict[int, list[list[Score | None]]] = {}
    written = 0
    sink: TextIO | None = open(output, "w", encoding="utf-8") if output is not None else None
    try:
        with RewardRunner(specs, workers, max_error_share=1.0) as runner:
            start = time.monotonic()
            compared = [spec.fn for spec, kind in zip(specs, runner.kinds, strict=True) if kind == "group"]
            groups = _groups(lines, 1 if "group" in runner.kinds else GROUP)
            exhausted = False
            while not exhausted or waiting:
                while not exhausted and len(waiting) < 64:
                    group = next(groups, None)
                    if group is None:
                        exhausted = True
                        break
                    texts = [text for line in group for text in line.texts]
                    rows = [line.row for line in group for _ in line.texts]
                    waiting[group[0].number] = group
                    runner.submit(group[0].number, texts, rows if len(group) > 1 else group[0].row)
                for key, scores in runner.completed():
                    for line, part in _per_line(waiting.pop(key), scores):
                        tally.add(line, part)
                        done += len(line.texts)
                        ready[line.number] = part
                if progress is not None:
                    progress(done, total)
                while sink is not None and written < len(lines) and lines[written].number in ready:
                    line = lines[written]
                    sink.write(dumps(_record(line, ready.pop(line.number), specs)) + "\n")
                    written += 1
    finally:
        if sink is not None:
            sink.close()
    tally.finish()
    notes = []
    if compared and all(len(line.texts) == 1 for line in lines):
        notes.append(f"{compared} take the samples of a prompt together, and every prompt here has one: a list of "
                     "completions in a line, or --group COLUMN (group= in Python), puts them together")  # fmt: skip
    return FileSummary(done, time.monotonic() - start, summaries, notes)


def explain(
    path: str | Path, reward: RewardSpec | str | Mapping[str, Any], line: int, completion: str = "completion"
) -> str:
    """For one line (from 1): what was extracted, how it was normalised and which rule decided, as text.

    A reward function can carry an attribute `explain`, called like itself, that returns (Score, steps); for others the
    score's `detail` is shown. Raises RewardError when the line does not exist or lacks a column.
    """
    spec = RewardSpec.of(reward)
    found = next((entry for entry in _read(Path(path), completion, "") if entry.number == line), None)
    if found is None:
        raise RewardError(f"{path} has no line {line}")
    loaded = load_reward(spec.fn, spec.params)
    shown = [f"{path}, line {line}, {spec.fn}"]
    for text in found.texts:
        steps: Mapping[str, str] = {}
        explainer = getattr(loaded.function, "explain", None)
        if callable(explainer) and not loaded.is_group:
            score, steps = explainer(completion=text, **loaded.arguments(found.row))
        else:
            score = loaded.one(text, found.row)
        ending = text if len(text) <= 300 else "... " + text[-300:]
        shown.append(f"completion  {ending!r}")
        shown += [f"{name:<11} {value}" for name, value in steps.items()]
        if score is None:
            shown.append("score       none: the reward does not apply to this row")
        else:
            shown.append(
                f"score       {score.value:g} ({score.verdict})"
                + (f": {score.detail}" if score.detail and not steps else "")
            )
            shown += [f"{name:<11} {value:g}" for name, value in score.metrics.items()]
    return "\n".join(shown)


@dataclass
class _Line:
    number: int
    texts: list[str]
    row: dict[str, Any]
    labels: list[bool] | None
    many: bool


def _read(path: Path, completion: str, label: str) -> list[_Line]:
    if not path.is_file():
        raise RewardError(f"no file {path}")
    lines = []
    with path.open() as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise RewardError(f"{path}, line {number}: not JSON ({error})") from error
            if isinstance(row, dict) and str(row.get("kind", "")).startswith("rlzero dump"):
                continue
            if isinstance(row, dict) and {"prompt", "rollouts"} <= set(row):  # a group of a dump
                row = {**row["prompt"]["row"], completion: [rollout["text"] for rollout in row["rollouts"]]}
            if not isinstance(row, dict) or completion not in row:
                columns = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise RewardError(
                    f"{path}, line {number}: no column {completion!r} (found {columns}); name it with --completion "
                    "(completion= in Python)"
                )
            said = row.pop(completion)
            many = isinstance(said, list)
            texts = said if many else [said]
            if not all(isinstance(one, str) for one in texts):
                raise RewardError(f"{path}, line {number}: {completion!r} must be a text or a list of texts")
            labels = None
            if label in row:
                given = row[label] if many else [row[label]]
                if not isinstance(given, list) or len(given) != len(texts):
                    raise RewardError(f"{path}, line {number}: {label!r} must hold one label per completion")
                labels = [_label(one, path, number) for one in given]
            lines.append(_Line(number, texts, row, labels, many))
    return lines


def _together(lines: Sequence[_Line], column: str, path: str | Path) -> list[_Line]:
    """One line per value of `column`, with the completions of all; their other columns are those of the first."""
    found: dict[str, _Line] = {}
    for line in lines:
        if column not in line.row:
            where = f"{path}, line {line.number}"
            raise RewardError(f"{where}: no column {column!r} to group by (found {sorted(line.row)})")
        first = found.setdefault(json.dumps(line.row[column], sort_keys=True), line)
        if first is not line:
            first.texts, first.many = first.texts + line.texts, True
            first.labels = None if first.labels is None or line.labels is None else first.labels + line.labels
    return list(found.values())


def _label(value: Any, path: Path, number: int) -> bool:
    known = {
        "true": True,
        "correct": True,
        "1": True,
        "1.0": True,
        "false": False,
        "wrong": False,
        "0": False,
        "0.0": False,
    }
    found = known.get(str(value).lower())
    if found is None:
        raise RewardError(f"{path}, line {number}: label {value!r}; use true or false, 1 or 0, 'correct' or 'wrong'")
    return found


def _groups(lines: Sequence[_Line], size: int) -> Iterator[list[_Line]]:
    """Lines of one completion together, for fewer messages; a line that is a group of its own stays alone (the plural
    form sees one prompt).
    """
    group: list[_Line] = []
    for line in lines:
        if line.many:
            if group:
                yield group
            yield [line]
            group = []
            continue
        group.append(line)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _per_line(group: Sequence[_Line], scores: Scores) -> Iterator[tuple[_Line, list[list[Score | None]]]]:
    at = 0
    for line in group:
        yield line, [reward[at : at + len(line.texts)] for reward in scores]
        at += len(line.texts)


def _record(line: _Line, scores: Scores, specs: Sequence[RewardSpec]) -> dict[str, Any]:
    samples = []
    for at in range(len(line.texts)):
        mine = [reward[at] for reward in scores]
        failed = any(score is not None and score.verdict == "error" for score in mine)
        sum_ = sum(spec.weight * score.value for spec, score in zip(specs, mine, strict=True) if score is not None)
        samples.append(
            {
                "reward": None if failed else sum_,
                "scores": [
                    None
                    if score is None
                    else {**asdict(score), "value": None if math.isnan(score.value) else score.value}
                    for score in mine
                ],
            }
        )
    return {"line": line.number, **({"samples": samples} if line.many else samples[0])}


class _Tally:
    def __init__(self, specs: Sequence[RewardSpec], summaries: list[RewardSummary], labelled: bool) -> None:
        self.summaries = summaries
        self.values: list[list[float]] = [[] for _ in specs]
        self.metrics: list[dict[str, list[float]]] = [{} for _ in specs]
        self.confusion = [Counter[tuple[bool, bool]]() for _ in specs] if labelled else None

    def add(self, line: _Line, scores: Scores) -> None:
        for index, (summary, samples) in enumerate(zip(self.summaries, scores, strict=True)):
            for at, score in enumerate(samples):
                summary.verdicts["not applicable" if score is None else score.verdict] += 1
                if score is None:
                    continue
                if score.verdict == "error":
                    summary.first_error = summary.first_error or f"line {line.number}: {score.detail}"
                    continue
                self.values[index].append(score.value)
                for name, value in score.metrics.items():
                    self.metrics[index].setdefault(name, []).append(value)
                if self.confusion is not None and line.labels is not None:
                    self.confusion[index][line.labels[at], score.verdict == "correct"] += 1

    def finish(self) -> None:
        for index, summary in enumerate(self.summaries):
            values = self.values[index]
            summary.mean_value = sum(values) / len(values) if values else math.nan
            summary.metrics = {name: sum(all_) / len(all_) for name, all_ in self.metrics[index].items()}
            if self.confusion is not None:
                count = self.confusion[index]
                summary.confusion = {
                    "right_correct": count[True, True],
                    "right_missed": count[True, False],
                    "wrong_rewarded": count[False, True],
                    "wrong_refused": count[False, False],
                }
