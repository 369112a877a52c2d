"""A reward: a function of the completion and, by name, of the row's columns. docs/rewards.md says all it may do."""

from rewards import Score
from rewards.extract import final_part


def is_the_sum(completion: str, answer: str) -> Score:
    """1 where the answer is the number, 0 where it is another, `unparsed` where it is none."""
    said = (final_part(completion).text or "").strip()
    if not said.isdecimal():
        return Score(0.0, "unparsed", detail=f"no number: {said[:40]!r}")
    return Score(float(said == answer), "correct" if said == answer else "wrong", detail=f"{said}, the sum is {answer}")


is_the_sum.expects = "one number and nothing else inside <answer>...</answer>"
