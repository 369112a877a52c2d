"""MATH-500 (arXiv 2305.20050): 500 competition problems with level and subject."""

from rlzero.eval.tasks.task import Task, mathematics

TASK = Task("math500", mathematics(), "rewards.math:math_reward", file="math500.jsonl")
