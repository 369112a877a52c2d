"""Countdown with three and four numbers, the demo's task: held-out questions of its generator, or a file of rows."""

from collections.abc import Iterable, Iterator

from rlzero.eval.tasks.task import Question, Task
from rlzero.examples.countdown import task
from rlzero.examples.countdown.text import expression


def _rows(source: str | None, limit: int | None) -> Iterable[dict]:
    return task.rows(split="held_out", seed=int(source or 0), count=limit or 1024)


def _question(row: dict, index: int) -> Question:
    numbers = tuple(row["numbers"])
    right = next(_ways(numbers, row["target"]))
    return Question(
        id=str(index),
        prompt=row["prompt"],
        columns={"numbers": list(numbers), "target": row["target"]},
        reference=f"<think>Search.</think> <answer>{expression(numbers, right)}</answer>",
        level=f"{len(numbers)} numbers",
    )


def _ways(numbers: task.Numbers, target: int) -> Iterator[tuple[task.Move, ...]]:
    """Orders of moves that reach `target` with all the numbers."""
    if len(numbers) == 1:
        yield from [()] if numbers == (target,) else []
        return
    for move in task.moves(numbers):
        if target in task.reachable(move.rest):
            yield from ((move, *tail) for tail in _ways(move.rest, target))


TASK = Task("countdown", _question, "rlzero.examples.countdown:countdown_reward", make=_rows, votes=False)
