"""GSM8K (arXiv 2110.14168): 1,319 word problems of grade school, each with one number."""

from rlzero.eval.tasks.task import Task, mathematics

TASK = Task("gsm8k", mathematics(), "rewards.math:math_reward", file="gsm8k_test.jsonl")
