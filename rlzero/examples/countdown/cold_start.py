"""Countdown questions with worked answers: rows for a cold start (arXiv 2501.12948, section 2.3) in miniature.

The questions are of the split `base`, so neither reinforcement learning nor its evaluation meets them again.
"""

from __future__ import annotations

import random

from rlzero.examples.countdown import task as countdown
from rlzero.examples.countdown.text import countdown_note


def rows(count: int, seed: int = 0, split: str = "train", chat: bool = False, **options) -> list[dict]:
    """`count` distinct questions with a thought and an answer that is right, as `prompt` and `completion`, or as one
    conversation each (`messages`). The held-out ones (`split` evaluation) come of another seed; `options` go to
    `countdown.tasks` (sizes, largest, targets)."""
    stream = seed if split == "train" else seed + 1_000_003
    rng = random.Random(f"cold start/{stream}")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    made = []
    for task in countdown.distinct("base", stream, count, {"sizes": (3,), "largest": (20,), **options}):
        thought, answer = countdown_note(rng, task, patience=1.0)
        made.append(_row(task.question, f" <think>{thought}</think> <answer>{answer}</answer>", chat))
    return made


def _row(question: str, completion: str, chat: bool) -> dict:
    if not chat:
        return {"prompt": question, "completion": completion}
    turns = [("user", question), ("assistant", completion.strip())]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
