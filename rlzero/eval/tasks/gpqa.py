"""GPQA (arXiv 2311.12022): four choices by experts, shuffled by the question's own text."""

import random

from rlzero.eval.tasks.task import Question, Task, column, multiple_choice


def _question(row: dict, index: int) -> Question:
    text = column(row, "Question", "question")
    right = str(column(row, "Correct Answer", "correct_answer")).strip()
    wrong = [str(column(row, f"Incorrect Answer {i}", f"incorrect_answer_{i}")).strip() for i in (1, 2, 3)]
    choices = [right, *wrong]
    random.Random(text).shuffle(choices)
    return multiple_choice(row, index, text, choices, choices.index(right))


TASK = Task("gpqa", _question, "rewards.math:math_reward", file="gpqa_diamond.csv")
