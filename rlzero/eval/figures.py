"""What a store says: figures of each task, by level and subject, and two models side by side. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from rlzero.eval import statistics
from rlzero.eval.statistics import Comparison, Estimate
from rlzero.eval.store import Evaluation, Sample

G_SHARE = 0.5  # of k samples, for G-Pass@k


@dataclass(frozen=True)
class Figures:
    """Of one task, or of its questions of one level or subject.

    `pass_at_1` is over graded samples; its interval also covers what the samples without a verdict could have been: all
    wrong at its low end, all right at its high end. `pass_at`, `g_pass_at` and `cons_at` map k to an estimate, up to
    the graded samples that every question has. Shares are of all samples that came; `errors` counts samples whose
    checker failed, `missing` those that never came, `empty` questions without a single graded sample."""

    questions: int
    samples: int
    pass_at_1: Estimate | None
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    g_pass_at: dict[int, Estimate] = field(default_factory=dict)
    cons_at: dict[int, Estimate] = field(default_factory=dict)
    errors: int = 0
    missing: int = 0
    empty: int = 0
    truncated: float = 0.0
    unparsed: float = 0.0
    length_mean: float = 0.0
    length_right: float | None = None
    length_wrong: float | None = None
    columns: dict[str, float] = field(default_factory=dict)


def figures(found: Evaluation, task: str, where: Callable[[str], bool] = lambda question: True) -> Figures:
    """Of a task's questions for which `where(id)` holds. Raises ValueError where there is none."""
    asked = [question for question in found.questions[task] if where(question)]
    if not asked:
        raise ValueError(f"task {task} has no such questions")
    n = int(found.meta["samples"])
    by_question = [[found.samples[task].get(q, {}).get(i) for i in range(n)] for q in asked]
    graded = [[s for s in samples if s is not None and s.correct is not None] for samples in by_question]
    came = [s for samples in by_question for s in samples if s is not None and s.verdict is not None]
    right = [sum(bool(s.correct) for s in samples) for samples in graded]
    full = [(c, samples) for c, samples in zip(right, graded, strict=True) if samples]
    k_most = min((len(samples) for _, samples in full), default=0)
    return Figures(
        questions=len(asked),
        samples=n,
        pass_at_1=_pass_at_1([(c, len(samples)) for c, samples in zip(right, graded, strict=True)], n),
        pass_at=_over_questions(range(1, k_most + 1), lambda k: [statistics.pass_at_k(len(s), c, k) for c, s in full]),
        g_pass_at=_over_questions(
            range(1, k_most + 1), lambda k: [statistics.g_pass_at_k(len(s), c, k, G_SHARE) for c, s in full]
        ),
        cons_at=_consensus([samples for _, samples in full], k_most) if found.meta["tasks"][task]["votes"] else {},
        errors=sum(s.verdict == "error" for s in came),
        missing=len(asked) * n - len(came),
        empty=len(asked) - len(full),
        truncated=_mean(s.finish == "length" for s in came) or 0.0,
        unparsed=_mean(s.verdict == "unparsed" for s in came) or 0.0,
        length_mean=_mean(s.tokens for s in came) or 0.0,
        length_right=_mean(s.tokens for s in came if s.correct),
        length_wrong=_mean(s.tokens for s in came if s.correct is False),
        columns={
            name: _mean(s.columns[name] for s in came if name in s.columns) or 0.0
            for name in sorted({name for s in came for name in s.columns})
        },
    )


def parts(found: Evaluation, task: str) -> dict[str, Figures]:
    """The figures of every level and subject that the task's questions name."""
    result = {}
    for kind in ("level", "subject"):
        values = sorted({str(v) for q in found.questions[task].values() if (v := getattr(q, kind)) is not None})
        for value in values if len(values) > 1 else ():
            members = {q.id for q in found.questions[task].values() if str(getattr(q, kind)) == value}
            result[f"{kind} {value}"] = figures(found, task, members.__contains__)
    return result


def compare(first: Evaluation, second: Evaluation) -> dict[str, tuple[Comparison, float]]:
    """For every task of both: `second` less `first` over the questions that both have graded, and its p-value adjusted
    for the number of tasks (Holm). Raises ValueError where they have no question in common."""
    found: dict[str, Comparison] = {}
    for task in first.questions:
        pairs = [
            (a, b)
            for q, question in first.questions[task].items()
            if second.questions.get(task, {}).get(q, None) == question
            and (a := _share(first, task, q)) is not None
            and (b := _share(second, task, q)) is not None
        ]
        if pairs:
            found[task] = statistics.compare(*map(list, zip(*pairs, strict=True)))
    if not found:
        raise ValueError(f"{first.name} and {second.name} have no graded question in common")
    return {
        task: (comparison, p)
        for (task, comparison), p in zip(
            found.items(), statistics.holm([c.p_value for c in found.values()]), strict=True
        )
    }


def counts(found: Evaluation, task: str) -> dict[str, tuple[int, int]]:
    """(correct, graded) of every question that has a graded sample."""
    result = {}
    for question, samples in found.samples[task].items():
        verdicts = [s.correct for s in samples.values() if s.correct is not None]
        if verdicts:
            result[question] = (sum(verdicts), len(verdicts))
    return result


def _share(found: Evaluation, task: str, question: str) -> float | None:
    verdicts = [s.correct for s in found.samples[task].get(question, {}).values() if s.correct is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _pass_at_1(questions: list[tuple[int, int]], n: int) -> Estimate | None:
    shares = [c / m for c, m in questions if m]
    if not shares:
        return None
    found = statistics.mean_interval(shares)
    if all(m == n for _, m in questions):
        return found
    low = statistics.mean_interval([c / n for c, m in questions]).low
    high = statistics.mean_interval([(c + n - m) / n for c, m in questions]).high
    return found._replace(low=min(low, found.low), high=max(high, found.high))


def _over_questions(ks: Iterable[int], values: Callable[[int], list[float]]) -> dict[int, Estimate]:
    return {k: statistics.mean_interval(values(k)) for k in ks}


def _consensus(questions: list[list[Sample]], k_most: int) -> dict[int, Estimate]:
    won = []
    for samples in questions:
        # All right answers are one candidate: the checker called each equal to the gold answer.
        answers = ["\0right" if s.correct else s.answer for s in samples]
        classes = statistics.equivalence_classes(answers, lambda a, b: False)
        won.append(statistics.consensus_at_k(classes, [bool(s.correct) for s in samples])[:k_most])
    each = np.array(won)  # [questions, k]
    return _over_questions(range(1, k_most + 1), lambda k: each[:, k - 1].tolist())


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None
