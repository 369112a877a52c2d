"""MMLU (arXiv 2009.03300) and its kin: a question, a list of choices, and the right one by index or letter."""

from rlzero.eval.tasks.task import Question, Task, column, multiple_choice


def _question(row: dict, index: int) -> Question:
    choices = [str(choice) for choice in (row.get("choices") or row.get("options") or [])]
    choices = choices or [str(row[letter]) for letter in "ABCD"]
    answer = row["answer_index"] if row.get("answer_index") is not None else row["answer"]
    right = int(answer) if str(answer).isdigit() else "ABCDEFGHIJ".index(str(answer).strip().upper())
    if not 2 <= len(choices) <= 10 or right >= len(choices):
        raise ValueError(f"{len(choices)} choices, answer {answer!r}")
    return multiple_choice(row, index, column(row, "question", "Question"), choices, right)


TASK = Task("mmlu", _question, "rewards.math:math_reward", file="mmlu.jsonl")
