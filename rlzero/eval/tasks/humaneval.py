"""HumanEval (arXiv 2107.03374): 164 functions to complete."""

from rlzero.eval.tasks.task import Question, Task, fenced

PROMPT = "Complete this Python function. Answer with the whole function in one ```python block.\n\n{code}"


def _question(row: dict, index: int) -> Question:
    return Question(
        id=str(row.get("task_id", index)),
        prompt=PROMPT.format(code=fenced(row["prompt"])),
        columns={"tests": row["test"], "entry_point": row["entry_point"], "setup": row["prompt"]},
        reference=fenced(row["prompt"] + row["canonical_solution"]) if row.get("canonical_solution") else None,
    )


TASK = Task("humaneval", _question, "rewards.code:code_reward", file="humaneval.jsonl", votes=False)
