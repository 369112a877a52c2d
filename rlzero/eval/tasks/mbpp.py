"""MBPP (arXiv 2108.07732), sanitized or whole: short programs with three assertions."""

from rlzero.eval.tasks.task import Question, Task, column, fenced

PROMPT = "{text}\nYour code should pass these tests:\n\n{tests}\n\nAnswer with the code in one ```python block."


def _question(row: dict, index: int) -> Question:
    tests = list(row["test_list"])
    before = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
    return Question(
        id=str(row.get("task_id", index)),
        prompt=PROMPT.format(text=column(row, "prompt", "text"), tests="\n".join(tests)),
        columns={"tests": tests, "prepare": before},
        reference=fenced(row["code"]) if row.get("code") else None,
    )


TASK = Task("mbpp", _question, "rewards.code:code_reward", file="mbpp_sanitized_427.jsonl", votes=False)
