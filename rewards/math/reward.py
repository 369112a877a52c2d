"""The accuracy reward for mathematics: is the one final value of this completion the right one?"""

from __future__ import annotations

from rewards.extract import AnswerTag
from rewards.math import verify as checker
from rewards.math.boxes import Boxed, find_answer
from rewards.math.equality import decide
from rewards.math.normal import Unreadable, key, normalise, strip_delimiters
from rewards.math.shape import mismatch
from rewards.score import Score


def math_reward(
    completion: str,
    answer: str,
    tolerance: float | None = None,
    boxed: Boxed = "auto",
    answer_tag: AnswerTag = "auto",
    require_think: bool = False,
) -> Score:
    r"""1 when the completion's one final value equals `answer`, 0 otherwise.

    The value is looked for strictly, as R1-Zero's rules do (arXiv 2501.12948): behind the last `</think>`, inside
    `<answer>` when the template has it, in the last balanced `\boxed{}` (see rewards.math.boxes); it must have the
    shape of the gold answer (rewards.math.shape) and equal it exactly, or within `tolerance` (relative). Verdicts:
    `unparsed` when no such value is stated or it is refused unread, `timeout` when two seconds do not decide. Raises
    ValueError for an empty or unreadable gold answer, rewards.math.VerifierError when the checker cannot run: those are
    errors of ours, never a reward.
    """
    score, _ = explain(completion, answer, tolerance, boxed, answer_tag, require_think)
    return score


def explain(
    completion: str,
    answer: str,
    tolerance: float | None = None,
    boxed: Boxed = "auto",
    answer_tag: AnswerTag = "auto",
    require_think: bool = False,
) -> tuple[Score, dict[str, str]]:
    """The score of `math_reward` and the steps to it: what was extracted, how both were read, which rule decided."""
    steps: dict[str, str] = {}
    gold_text = str(answer).rpartition("####")[2].strip()
    try:
        gold = normalise(gold_text)
    except Unreadable as refused:
        raise ValueError(
            f"the gold answer {gold_text[:80]!r} cannot be read ({refused}); fix the data set"
        ) from refused
    if not gold:
        raise ValueError("the gold answer is empty; fix the data set or drop the row")
    steps["gold"] = gold
    found = find_answer(completion, boxed, answer_tag, require_think)
    steps["extraction"] = found.why
    if found.text is None:
        return Score(0.0, "unparsed", detail=found.why), steps
    steps["extracted"] = found.text
    try:
        value = normalise(found.text)
    except Unreadable as refused:
        steps["rule"] = f"refused: {refused}"
        return Score(0.0, "unparsed", detail=steps["rule"]), steps
    steps["read as"] = value
    if key(value) == key(gold):
        steps["rule"] = "same text"
        return Score(1.0, "correct", detail="same text"), steps
    if checker.is_prose(strip_delimiters(found.text)):
        steps["rule"] = "not one value"
        return Score(0.0, "unparsed", detail="not one value"), steps
    try:
        why = mismatch(gold, value, tolerance is not None)
    except Unreadable as refused:
        steps["rule"] = f"refused: {refused}"
        return Score(0.0, "unparsed", detail=steps["rule"]), steps
    if why is not None:
        steps["rule"] = f"shape: {why}"
        return Score(0.0, "wrong", detail=steps["rule"]), steps
    decision = decide(gold_text, found.text, tolerance)
    steps["rule"] = decision.rule
    if decision.timeout:
        return Score(0.0, "timeout", detail=decision.rule), steps
    if decision.rule.startswith("refused"):
        return Score(0.0, "unparsed", detail=decision.rule), steps
    return Score(float(decision.equal), "correct" if decision.equal else "wrong", detail=decision.rule), steps


math_reward.warm = checker.warm  # type: ignore[attr-defined]
math_reward.explain = explain  # type: ignore[attr-defined]
