"""AIME of any year: problems whose answer is an integer from 0 to 999."""

from rlzero.eval.tasks.task import Task, column, mathematics


def _answer(row: dict) -> str:
    return str(int(column(row, "answer", "Answer")))  # "025" is 25


TASK = Task("aime", mathematics(_answer), "rewards.math:math_reward", file="aime.jsonl")
