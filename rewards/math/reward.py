"""The accuracy reward for mathematics: is the one final value of this completion the right one?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Number
from typing import Any

from rewards.extract import AnswerTag
from rewards.math.boxes import Boxed, find_answer
from rewards.math.equality import decide
from rewards.math.formula import formula, same
from rewards.math.normal import Unreadable, normalise
from rewards.math.phrase import last_value
from rewards.score import Score


class GoldError(ValueError):
    """A gold answer that no completion can match; the message says what is wrong with it."""


def read_gold(answer: Any) -> tuple[str, str]:
    """The text of a gold answer (behind `####`, as GSM8K writes it) and its canonical spelling.

    Strings and numbers are golds; raises GoldError for anything else, for what is empty, not a number (NaN, which
    tables write where a value is missing), or not readable.
    """
    if hasattr(answer, "item") and getattr(answer, "ndim", None) == 0:  # a NumPy scalar
        answer = answer.item()
    missing = isinstance(answer, float) and not math.isfinite(answer)
    if missing or not isinstance(answer, (str, Number)):
        raise GoldError(f"the gold answer is {str(answer)[:40]!r} ({type(answer).__name__}); expected text or a number")
    text = str(answer).rpartition("####")[2].strip()
    if not text or text.lower() in ("nan", "null"):
        raise GoldError(f"the gold answer is {'empty' if not text else repr(text)}; fix the data set or drop the row")
    try:
        gold = normalise(text)
    except Unreadable as refused:
        raise GoldError(f"the gold answer {text[:80]!r} cannot be read ({refused}); fix the data set") from refused
    if not gold:
        raise GoldError(f"the gold answer {text[:80]!r} is empty; fix the data set or drop the row")
    return text, gold


def check_row(row: Mapping[str, Any]) -> str | None:
    r"""Why no completion can be right on this row: its gold answer is missing, unreadable, or cannot stand in a
    `\boxed{}`; None when one can."""
    try:
        text, gold = read_gold(row.get("answer"))
    except GoldError as error:
        return str(error)
    found = find_answer(f"\\boxed{{{text}}}")
    if found.text is None:
        return f"the gold answer {text[:80]!r} cannot stand in a \\boxed{{}}: {found.why}"
    return None


def math_reward(
    completion: str,
    answer: str,
    tolerance: float | None = None,
    boxed: Boxed = "auto",
    answer_tag: AnswerTag = "auto",
    require_think: bool = False,
    strict: bool = False,
) -> Score:
    r"""1 when the completion's one final value equals `answer`, 0 otherwise.

    The value is looked for strictly, as R1-Zero's rules do (arXiv 2501.12948): behind the last `</think>`, inside
    `<answer>` when the template has it, in the last balanced `\boxed{}` (see rewards.math.boxes); inside `<answer>`
    without a box, the one value of a short phrase counts too, unless `strict`. It must be read completely and equal
    the gold answer part by part, exactly or within `tolerance` (relative). Verdict `unparsed` when
    no such value is stated or a part of it is not read. Raises GoldError (a ValueError) for a gold answer that cannot
    be matched: an error of the data, never a reward.
    """
    score, _ = explain(completion, answer, tolerance, boxed, answer_tag, require_think, strict)
    return score


def explain(
    completion: str,
    answer: str,
    tolerance: float | None = None,
    boxed: Boxed = "auto",
    answer_tag: AnswerTag = "auto",
    require_think: bool = False,
    strict: bool = False,
) -> tuple[Score, dict[str, str]]:
    """The score of `math_reward` and the steps to it: what was extracted, how both were read, which rule decided."""
    steps: dict[str, str] = {}
    gold_text, gold = read_gold(answer)
    steps["gold"] = gold
    found = find_answer(completion, boxed, answer_tag, require_think, strict)
    steps["extraction"] = found.why
    if found.text is None:
        return Score(0.0, "unparsed", detail=found.why), steps
    steps["extracted"] = found.text
    decision = decide(gold_text, found.text, tolerance)
    steps["read as"], steps["rule"] = decision.prediction, decision.rule
    verdict = "correct" if decision.equal else "unparsed" if decision.unread else "wrong"
    return Score(float(decision.equal), verdict, detail=decision.rule), steps


def equal(gold: str, prediction: str, tolerance: float | None = None) -> bool:
    """Whether two texts state the same mathematical answer (see rewards.math.decide). Running text stands for its
    boxes, else for its last formula or number."""
    decision = decide(gold, prediction, tolerance)
    return decision.equal or decide(last_value(gold), last_value(prediction), tolerance).equal


def warm() -> None:
    """Imports what a comparison needs; called once in a runner's fork server, so that every forked worker has it."""
    same(formula("\\sqrt{8}"), formula("2\\sqrt{2}"))


math_reward.warm = warm  # type: ignore[attr-defined]
math_reward.explain = explain  # type: ignore[attr-defined]
math_reward.check_row = check_row  # type: ignore[attr-defined]
math_reward.expects = (  # type: ignore[attr-defined]
    "one final value in \\boxed{...}, or inside <answer>...</answer>, behind </think> where it thinks"
)
