"""LiveCodeBench (arXiv 2403.07974) and its kin: contest problems with inputs and outputs of a program or a function."""

import json

from rlzero.eval.tasks.task import Question, Task, column

PROMPT = "{text}\n\n{how} Answer with the code in one ```python block."
PROGRAM = "Write a Python program that reads standard input and writes standard output."


def _question(row: dict, index: int) -> Question:
    metadata = row.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    tests = row.get("tests")
    if tests is None:
        cases = [case for name in ("public_test_cases", "private_test_cases") for case in _cases(row.get(name))]
        tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
        if name := metadata.get("func_name"):
            inputs = [[json.loads(line) for line in text.split("\n") if line] for text in tests["inputs"]]
            tests = {"fn_name": name, "inputs": inputs, "outputs": [json.loads(text) for text in tests["outputs"]]}
    how = f"Write it into this code:\n\n{row['starter_code']}\n" if row.get("starter_code") else PROGRAM
    return Question(
        id=str(row.get("question_id") or row.get("id") or index),
        prompt=PROMPT.format(text=column(row, "question_content", "prompt", "question"), how=how),
        columns={"tests": tests},
        level=row.get("difficulty"),
        subject=row.get("platform"),
    )


def _cases(found: object) -> list[dict]:
    return json.loads(found) if isinstance(found, str) else list(found or [])


TASK = Task(
    "livecodebench", _question, "rewards.code:code_reward", file="livecodebench.jsonl", timeout_s=60.0, votes=False
)
