"""What a reward says about one completion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["correct", "wrong", "unparsed", "timeout", "error"]


@dataclass(frozen=True)
class Score:
    """The outcome of one reward on one completion.

    `value` is the reward before its weight. `verdict` says why: `timeout` is the *answer's* fault (checking it took
    too long) and counts as wrong; `error` is ours (a crashed checker, a missing isolation layer) and is never a reward:
    the loop masks the sample and stops the run when such errors become frequent. `metrics` are averaged into the step's
    log. `detail` is for people: the traceback of an error, or what was extracted and which rule decided.
    """

    value: float
    verdict: Verdict
    metrics: dict[str, float] = field(default_factory=dict)
    detail: str = ""

    @classmethod
    def error(cls, detail: str) -> Score:
        """An infrastructure error. Its value is NaN, so that one that is used by mistake shows at once."""
        return cls(math.nan, "error", detail=detail)
