"""Tasks of the package reasoning-gym by name (`reasoning_gym:leg_counting`): its generators make questions and answers.
Answers are compared by the mathematics checker; the package's own scorers, which run answers as code, are not used."""

from collections.abc import Iterable

from rlzero.config.read import UsageError
from rlzero.eval.tasks.task import BOXED, Question, Task

COUNT = 200


def _rows(source: str | None, limit: int | None) -> Iterable[dict]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError("task reasoning_gym needs the package: pip install reasoning-gym") from error
    name, _, seed = (source or "").partition(":")
    known = sorted(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise UsageError(f"task reasoning_gym: name one of its tasks, reasoning_gym:{known[0]}; there are {known}")
    return list(reasoning_gym.create_dataset(name, size=limit or COUNT, seed=int(seed or 0)))


def _question(row: dict, index: int) -> Question:
    answer = str(row["answer"])
    return Question(
        id=str(index),
        prompt=BOXED.format(question=row["question"]),
        columns={"answer": answer},
        reference=f"\\boxed{{{answer}}}",
        level=str(row["metadata"]["difficulty"]) if row.get("metadata", {}).get("difficulty") else None,
    )


TASK = Task("reasoning_gym", _question, "rewards.math:math_reward", make=_rows)
