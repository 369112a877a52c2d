"""What a reward says about one completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["correct", "wrong", "unparsed", "timeout", "error"]


@dataclass(frozen=True)
class Score:
    """The outcome of one reward on one completion.

    `value` is the reward before its weight. `verdict` says why: `timeout` is the *answer's* fault (checking it took
    too long) and counts as wrong; `error` is ours (a crashed checker, a missing wall) and is never a reward: the loop
    masks the sample and stops the run when such errors become frequent. `metrics` are averaged into the step's log.
    """

    value: float
    verdict: Verdict
    metrics: dict[str, float] = field(default_factory=dict)
