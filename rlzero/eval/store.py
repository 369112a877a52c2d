"""Outcomes of an evaluation in a folder: every sample once, with all that any statistic asks of it.

`meta.json` says what was asked of which model; `questions.jsonl` and `samples.jsonl` are written as they come, a line a
record, so that an evaluation that was killed goes on from the last whole line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlzero.config.read import UsageError
from rlzero.eval.tasks.task import Question

VERSION = 1  # of the files' form
MAY_CHANGE = ("date", "code")  # between the parts of one evaluation


@dataclass(frozen=True)
class Sample:
    """One completion and its verdict. `answer` is what it votes for in canonical spelling, None where there is none.
    `columns` are shares that other checkers found (format, language). A request that failed has finish `failed`, no
    verdict and the cause in `detail`: it is missing, not wrong."""

    task: str
    question: str
    sample: int
    text: str
    tokens: int
    finish: str
    verdict: str | None
    value: float | None = None
    answer: str | None = None
    detail: str = ""
    columns: dict[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> bool | None:
        """None where the checker failed or the sample is missing."""
        return None if self.verdict in (None, "error") else self.verdict == "correct"


@dataclass(frozen=True)
class Evaluation:
    """All of a store: `questions[task][id]` and `samples[task][id]`, the latter by sample number."""

    meta: dict[str, Any]
    questions: dict[str, dict[str, Question]]
    samples: dict[str, dict[str, dict[int, Sample]]]

    @property
    def name(self) -> str:
        return self.meta["model"]


class Store:
    """A folder of outcomes, open for more. Raises `UsageError` where it holds those of something else."""

    def __init__(self, folder: str | Path, meta: Mapping[str, Any], questions: Mapping[str, list[Question]]):
        self.folder, self.meta = Path(folder), {"version": VERSION, **meta}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "meta.json").exists():
            self._same_as_before()
        else:
            with (self.folder / "questions.jsonl").open("w", encoding="utf-8") as file:
                for task, asked in questions.items():
                    file.writelines(_line({"task": task, **asdict(question)}) for question in asked)
            _write(self.folder / "meta.json", json.dumps(self.meta, indent=1, ensure_ascii=False) + "\n")
        self._path = self.folder / "samples.jsonl"
        self.done = {(s.task, s.question, s.sample) for s in _samples(self._path, cut=True) if s.correct is not None}
        self._file = self._path.open("a", encoding="utf-8")

    def add(self, sample: Sample) -> None:
        self._file.write(_line(asdict(sample)))
        self._file.flush()
        self.done.add((sample.task, sample.question, sample.sample))

    def close(self) -> None:
        self._file.close()

    def _same_as_before(self) -> None:
        found, asked = _meta(self.folder), json.loads(json.dumps(self.meta))
        changed = [k for k in asked if k not in MAY_CHANGE and asked[k] != found.get(k)]
        if changed:
            said = "; ".join(f"{k} was {found.get(k)!r}, now {asked[k]!r}" for k in changed)
            raise UsageError(
                f"{self.folder}: holds another evaluation ({said}); ask for the same again to go on, or name another "
                "--store"
            )


def load(folder: str | Path) -> Evaluation:
    """What a store holds; of a sample that was asked again the newest. Raises `UsageError` for other folders."""
    folder = Path(folder)
    meta = _meta(folder)
    questions: dict[str, dict[str, Question]] = {}
    for record in _records(folder / "questions.jsonl", cut=False):
        task = record.pop("task")
        questions.setdefault(task, {})[record["id"]] = Question(**record)
    samples: dict[str, dict[str, dict[int, Sample]]] = {task: {} for task in questions}
    for sample in _samples(folder / "samples.jsonl", cut=False):
        samples[sample.task].setdefault(sample.question, {})[sample.sample] = sample
    return Evaluation(meta, questions, samples)


def _meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"{folder}: no evaluation is stored here ({error}); `rlzero eval MODEL --tasks ...` makes one"
        raise UsageError(why) from error
    if meta.get("version") != VERSION:
        raise UsageError(f"{folder}: a store of form {meta.get('version')!r}; this release reads {VERSION}")
    return meta


def _samples(path: Path, cut: bool) -> Iterator[Sample]:
    yield from (Sample(**record) for record in _records(path, cut))


def _records(path: Path, cut: bool) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; with `cut` a torn last line, of a writer that was killed, is taken off."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if cut and whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            why = f"{path}:{number}: a damaged line ({error}); remove it, and its sample is asked for again"
            raise UsageError(why) from error


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode() + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
