"""Figures of evaluations as lines of text."""

from __future__ import annotations

from rlzero.eval.figures import Figures, compare, counts, figures, parts
from rlzero.eval.statistics import Estimate, questions_needed, spread_of
from rlzero.eval.store import Evaluation

SHOWN_K = (1, 2, 4, 8, 16, 32, 64)


def describe(found: Evaluation) -> list[str]:
    """A table of the tasks, what is odd about them, and figures by level and subject."""
    sampling = found.meta["sampling"]
    lines = [
        f"{found.name}: {found.meta['samples']} sample(s) a question, temperature {sampling['temperature']}, top-p "
        f"{sampling['top_p']}, up to {sampling['max_tokens']} tokens, template {found.meta['template']}"
    ]
    for task in found.questions:
        whole = figures(found, task)
        lines += ["", f"{task}: {whole.questions} questions", *_of_task(whole)]
        for name, part in parts(found, task).items():
            lines.append(f"  {name:<24} {_interval(part.pass_at_1)}  ({part.questions} questions)")
    return lines


def _of_task(f: Figures) -> list[str]:
    lines = [f"  pass@1    {_interval(f.pass_at_1)}"]
    for name, values in (("pass", f.pass_at), ("G-pass", f.g_pass_at), ("cons", f.cons_at)):
        ks = [k for k in SHOWN_K[1:] if k in values]
        if ks:
            lines.append(f"  {name + '@k':<9} " + "   ".join(f"{k}: {values[k].mean:.1%}" for k in ks))
    if f.errors or f.missing:
        lines.append(
            f"  without a verdict: {f.errors} samples whose checker failed, {f.missing} that are missing; {f.empty} "
            "questions have none at all. The interval holds whatever they would have been"
        )
    right = "" if f.length_right is None else f", right ones {f.length_right:.0f}"
    wrong = "" if f.length_wrong is None else f", wrong ones {f.length_wrong:.0f}"
    lines.append(f"  tokens    {f.length_mean:.0f} on average{right}{wrong}")
    shares = {"truncated": f.truncated, "unparsed": f.unparsed, **f.columns}
    lines.append("  shares    " + "   ".join(f"{name} {value:.1%}" for name, value in shares.items()))
    return lines


def describe_comparison(first: Evaluation, second: Evaluation) -> list[str]:
    """Two models side by side: difference, interval, test."""
    lines = [f"{second.name} less {first.name}, questions of both:"]
    for task, (found, adjusted) in compare(first, second).items():
        said = "differ" if adjusted < 0.05 else "not told apart"
        lines.append(
            f"  {task:<16} {found.difference:+.1%} [{found.low:+.1%}, {found.high:+.1%}]  p {found.p_value:.3g}, "
            f"{adjusted:.3g} for all tasks: {said} ({found.questions} questions; {found.test})"
        )
    return lines


def describe_plan(first: Evaluation, second: Evaluation, difference: float) -> list[str]:
    """Questions that a wanted difference needs (power 80 %, level 95 %), from two stores as a pilot."""
    lines = [f"questions that show a difference of {difference:.1%} four times out of five:"]
    for task in compare(first, second):
        one, two = counts(first, task), counts(second, task)
        shared = [q for q in one if q in two]
        spread = spread_of([one[q] for q in shared], [two[q] for q in shared])
        needed = "   ".join(f"n {n}: {questions_needed(difference, n, spread)}" for n in (1, 4, 16, 64))
        lines.append(f"  {task:<16} {needed}")
    return lines


def _interval(estimate: Estimate | None) -> str:
    return "no sample has a verdict" if estimate is None else (
        f"{estimate.mean:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"
    )
