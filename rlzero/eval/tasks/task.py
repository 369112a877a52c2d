"""What a benchmark is: rows of a file or a generator, the question put to a model, and who says what is right."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlzero.config.read import UsageError
from rlzero.data.sources import load_rows

BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Question:
    """One question. `columns` are what the reward is called with; `reference` is a completion that is right, None where
    the data has none; `level` and `subject` are what figures are told apart by."""

    id: str
    prompt: str
    columns: dict[str, Any]
    reference: str | None = None
    level: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark. `file` is its usual name inside a folder of data; where it is None, `make` generates rows.
    `question` turns a row into a question; `reward` is an address; `votes` says whether answers can be compared for a
    majority."""

    name: str
    question: Callable[[dict[str, Any], int], Question]
    reward: str
    file: str | None = None
    make: Callable[..., Iterable[dict[str, Any]]] | None = None
    params: dict[str, Any] = field(default_factory=dict)  # of the reward
    timeout_s: float = 10.0
    votes: bool = True

    def questions(self, source: str | Path | None, data: Path, limit: int | None = None) -> list[Question]:
        """The questions of `source` (a file, a hub name, an argument of the generator), else of the task's usual file
        in folder `data`. Raises `UsageError` for a source that is not there, and names the row that lacks a column."""
        if self.make is not None:
            rows = [(values, f"{self.name}[{i}]") for i, values in enumerate(self.make(source, limit))]
        else:
            path = Path(source) if source else data / str(self.file)
            if source is None and not path.exists():
                raise UsageError(
                    f"task {self.name}: no file {path}; name one ({self.name}:path/to/file) or the folder with --data"
                )
            rows = [(row.values, row.where) for row in load_rows(str(path), {}, "evaluation", 0)]
        found: list[Question] = []
        for index, (values, where) in enumerate(rows[:limit]):
            try:
                found.append(self.question(values, index))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UsageError(
                    f"{where}: not a row of {self.name}: {type(error).__name__}: {error}; found the columns "
                    f"{', '.join(map(str, values))}"
                ) from error
        if len({question.id for question in found}) < len(found):
            raise UsageError(f"task {self.name}: two questions have one id; ids must differ")
        return found


def names() -> list[str]:
    """Of the tasks that are shipped."""
    here = Path(__file__).parent
    return sorted(m.name for m in pkgutil.iter_modules([str(here)]) if m.name != "task")


def find(spec: str) -> tuple[Task, str | None]:
    """`name` or `name:source` -> the task and its source. Raises `UsageError` with the names that exist."""
    name, _, source = spec.partition(":")
    if name.replace("-", "_") not in names():
        raise UsageError(f"--tasks: no task {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"rlzero.eval.tasks.{name.replace('-', '_')}").TASK, source or None


def column(row: dict[str, Any], *names: str) -> Any:
    """The first of `names` that the row has and that is not empty. Raises KeyError."""
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise KeyError(f"none of the columns {', '.join(names)}")


def mathematics(answer: Callable[[dict[str, Any]], str] | None = None) -> Callable[[dict[str, Any], int], Question]:
    """The reader of rows with a problem and one final answer."""

    def read(row: dict[str, Any], index: int) -> Question:
        gold = answer(row) if answer else str(column(row, "answer", "Answer", "final_answer"))
        reference = f"\\boxed{{{gold.rpartition('####')[2].strip()}}}"
        return Question(
            id=str(row.get("id") or row.get("unique_id") or index),
            prompt=BOXED.format(question=column(row, "question", "problem", "Problem", "prompt")),
            columns={"answer": gold},
            reference=reference,
            level=None if row.get("level") is None else str(row["level"]),
            subject=row.get("subject") or row.get("type"),
        )

    return read


def multiple_choice(row: dict[str, Any], index: int, text: str, choices: list[str], right: int) -> Question:
    """A question whose answer is the letter of a choice."""
    letters = "ABCDEFGHIJ"[: len(choices)]
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    return Question(
        id=str(row.get("id") or row.get("Record ID") or index),
        prompt=BOXED.format(question=f"{text}\n{listed}\nAnswer with the letter of one choice."),
        columns={"answer": letters[right]},
        reference=f"\\boxed{{{letters[right]}}}",
        subject=row.get("subject") or row.get("High-level domain") or row.get("category"),
    )


def fenced(code: str) -> str:
    """A completion that answers with `code`."""
    return f"```python\n{code}\n```"
