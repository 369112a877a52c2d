"""A run of `train` or `sft` as one self-contained HTML page, its summary as JSON, and its curve as one SVG.

`write_report("runs/demo")` reads what `RunLog` wrote there and leaves `report.html` and `summary.json` beside it. The
page (page.html.jinja) needs nothing from outside, runs no script and follows the reader's light or dark setting.
Whatever a file says is text: Jinja2 escapes it, and only finite numbers are drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlzero.config.read import UsageError
from rlzero.report import plots
from rlzero.report.plots import Series, plain
from rlzero.report.record import Numbers, Question, RunRecord, read_run

# Parts of a step in the order they happen; what a run times besides them follows.
PARTS = ("generate", "rollout", "score", "train", "sync", "save", "eval")
VERDICTS = ("correct", "wrong", "unparsed", "timeout", "error")
# Plots of one or more metrics: title, {metric: label}, whether the axis begins at 0. One without values is left out.
PLOTS = (
    ("Completion length, tokens", {"length_mean": "mean"}, True),
    ("Truncated completions, share", {"truncated": "truncated"}, True),
    ("Loss, nats per learned token", {"loss": "training", "mtp_loss": "multi-token prediction"}, False),
    ("Policy loss", {"policy_loss": "policy loss"}, False),
    ("Gradient norm", {"grad_norm": "gradient norm"}, True),
    ("Learning rate", {"lr": "learning rate"}, True),
    ("KL to the reference", {"kl_reference": "kl"}, False),
    ("Entropy, nats per token", {"entropy": "entropy"}, True),
    ("Engine against trainer, log-probabilities",
     {"gap": "mean |Δ|", "gap_k3": "k3", "gap_outside": "share outside [0.5, 2]"}, True),
    ("Staleness, policy versions", {"staleness_mean": "mean", "staleness_max": "max"}, True),
    ("Tokens per second", {"tokens_per_s": "tokens/s"}, True),
    ("GPU memory, bytes: planned and measured", {
        "memory_planned_bytes": "planned, a trainer's GPU", "memory_device_bytes": "held of it, all processes",
        "memory_trainer_reserved_bytes": "trainer", "memory_engine_reserved_bytes": "engine"}, True),
)  # fmt: skip
MOST_SERIES = 8  # of one plot


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` and `summary.json` into `run_dir` and returns the page's path. Raises `UsageError` where no
    run has written."""
    run_dir = Path(run_dir)
    record = _read(run_dir)
    figures = _summary(record)
    _write(run_dir / "summary.json", json.dumps(figures, indent=2) + "\n")
    page = run_dir / "report.html"
    loader = jinja2.PackageLoader("rlzero.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": _or_dash(plain), "percent": _or_dash(lambda v: f"{100 * v:.1f} %")}
    template = environment.get_template("page.html.jinja")
    text = template.render(
        run=record, figures=figures, tiles=_tiles(record, figures), plots=_plots(record), verdicts=VERDICTS,
        samples=_first_middle_last(record.samples), before_and_after=_before_and_after(record.evaluation_samples),
        variables=Markup(plots.VARIABLES), duration=_duration(figures["wall_s"]),
    )  # fmt: skip
    _write(page, text)
    return page


def summary(run_dir: str | Path) -> dict[str, Any]:
    """The run in figures. `wall_s` counts the steps and the evaluations, over all of a resumed run's parts; what is
    not known (a run without evaluation) is None."""
    return _summary(_read(Path(run_dir)))


def curve_svg(run_dir: str | Path, path: str | Path) -> Path:
    """pass@1 and cons@k of the held-out questions over the run's steps as one SVG file, for a README, with the mean of
    every checker that gives shares (0 to 1) in training; returns `path`."""
    record, path = _read(Path(run_dir)), Path(path)
    shares = [s for s in _reward_series(record.steps) if all(0 <= (y or 0) <= 1 for y in s.ys)]
    svg = plots.line_chart(_pass_series(record.evaluations) + shares, share=True, size=(760, 320))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, svg.replace("<defs>", f"<defs><style>{plots.VARIABLES}</style>", 1))
    return path


def _read(run_dir: Path) -> RunRecord:
    record = read_run(run_dir)
    if not record.steps and not record.evaluations:
        raise UsageError(f"{run_dir}: no run has written here (no metrics.jsonl or evals.jsonl with a line in it)")
    return record


def _summary(record: RunRecord) -> dict[str, Any]:
    steps, evaluations = record.steps, record.evaluations
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    after = last if len(evaluations) > 1 else {}
    tokens = sum(line.get("rollout_tokens") or line.get("packed_tokens") or 0 for line in steps)
    return {
        "name": record.name,
        "seed": record.config.get("seed"),
        "steps": len(steps),
        "pass_at_1_before": first.get("pass_at_1"),
        "pass_at_1_after": after.get("pass_at_1"),
        "cons_at_k_before": first.get("cons_at_k"),
        "cons_at_k_after": after.get("cons_at_k"),
        "loss_before": first.get("loss"),
        "loss_after": after.get("loss"),
        "evaluation_prompts": last.get("prompts"),
        "evaluation_samples": last.get("n"),
        "wall_s": round(sum(_step_s(line) for line in steps) + sum(e.get("time_s", 0.0) for e in evaluations), 3),
        "rollout_tokens": int(tokens),
        "reward_first": steps[0].get("reward_mean") if steps else None,
        "reward_last": steps[-1].get("reward_mean") if steps else None,
    }


def _tiles(record: RunRecord, figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the figures at the page's head, those that the run has."""
    steps, percent, number = record.steps, _or_dash(lambda v: f"{100 * v:.1f} %"), _or_dash(plain)
    rollout_s = sum(line.get("time_generate_s") or line.get("time_rollout_s") or 0.0 for line in steps)
    k, tokens = figures["evaluation_samples"] or "k", figures["rollout_tokens"]
    tiles: list[tuple[str, str]] = []
    if figures["pass_at_1_before"] is not None:
        tiles += [(f"pass@1 {when}", percent(figures[f"pass_at_1_{when}"])) for when in ("before", "after")]
        tiles += [(f"cons@{k} {when}", percent(figures[f"cons_at_k_{when}"])) for when in ("before", "after")]
    if figures["loss_before"] is not None:
        tiles += [(f"held-out loss {when}", number(figures[f"loss_{when}"])) for when in ("before", "after")]
    tiles += [("wall time", _duration(figures["wall_s"])), ("tokens", plain(tokens))]
    if rollout_s:
        tiles.append(("tokens/s of rollouts", plain(tokens / rollout_s)))
    if gaps := [line["gap"] for line in steps if "gap" in line]:
        tiles.append(("worst mean |Δ log p|", plain(max(gaps))))
    return [*tiles, ("seed", str(figures["seed"]))]


def _plots(record: RunRecord) -> list[tuple[str, Markup, bool]]:
    """(title, SVG, whether it is wide) of every plot that has values."""
    steps, evaluations = record.steps, record.evaluations
    found: list[tuple[str, str, bool]] = []

    def add(title: str, series: Sequence[Series], **how: bool) -> None:
        series = [s for s in series if any(y is not None for y in s.ys)][:MOST_SERIES]
        if series:
            found.append((title, plots.line_chart(series, **how), False))

    add("Held-out questions: pass@1 and cons@k", _pass_series(evaluations), share=True)
    add("Held-out loss, nats per learned token", [_series(evaluations, "loss", "held out", points=True)])
    rewards = _reward_series(steps)
    add("Reward", [_series(steps, "reward_mean", "sum", smooth=True), *(rewards if len(rewards) > 1 else [])])
    verdicts = {v: _values(steps, f"verdict/{v}") for v in VERDICTS if any(line.get(f"verdict/{v}") for line in steps)}
    if verdicts:
        title = "Verdicts, share of completions"
        found.append((title, plots.stacked(_values(steps, "step"), verdicts, share=True, first=2), False))
    for title, metrics, from_zero in PLOTS:
        if any(line.get(key) for line in steps for key in metrics):  # staleness is 0 throughout in most runs
            add(title, [_series(steps, key, label, smooth=True) for key, label in metrics.items()], from_zero=from_zero)
    if parts := _parts(steps):
        bars = plots.stacked(_values(steps, "step"), parts, size=(1090, 250))
        found.append(("Time of a step, seconds", bars, True))
    return [(title, Markup(svg), wide) for title, svg, wide in found]


def _pass_series(evaluations: Sequence[Numbers]) -> list[Series]:
    k = f"{evaluations[-1].get('n', 0):.0f}" if evaluations else "k"
    return [
        _series(evaluations, "pass_at_1", "pass@1", points=True),
        _series(evaluations, "cons_at_k", f"cons@{k}", points=True),
    ]


def _reward_series(steps: Sequence[Numbers]) -> list[Series]:
    """The mean of every reward; `reward/<name>` is one, `reward/<name>/<metric>` a detail of it."""
    names = sorted({key for line in steps for key in line if key.startswith("reward/") and key.count("/") == 1})
    return [_series(steps, name, name.removeprefix("reward/"), smooth=True) for name in names]


def _parts(steps: Sequence[Numbers]) -> dict[str, list[float | None]]:
    """Seconds of every part of a step that was timed, and what is left of the step's whole time."""
    timed = {key[5:-2] for line in steps for key in line if key.startswith("time_") and key.endswith("_s")} - {"step"}
    names = [n for n in PARTS if n in timed] + sorted(timed - set(PARTS))
    parts = {name: _values(steps, f"time_{name}_s") for name in names[:MOST_SERIES]}
    rest = [max(0.0, _step_s(line) - sum(line.get(f"time_{n}_s", 0.0) for n in names)) for line in steps]
    return {**parts, "rest" if parts else "whole step": rest} if any(rest) else parts


def _first_middle_last(samples: Sequence[Question]) -> list[tuple[str, Question]]:
    chosen = {0: "Start", len(samples) // 2: "Middle", len(samples) - 1: "End"} if samples else {}
    return [(title, samples[index]) for index, title in chosen.items()]


def _before_and_after(samples: Sequence[Question]) -> list[tuple[str, Question]]:
    """The first question of the first evaluation, and the same question in the last."""
    if not samples:
        return []
    first = samples[0]
    again = [q for q in samples if q.prompt == first.prompt and q.step > first.step]
    return [("Before", first), *(("After", q) for q in again[-1:])]


# --- small things ----------------------------------------------------------------------------------------------------


def _series(lines: Sequence[Numbers], key: str, name: str, points: bool = False, smooth: bool = False) -> Series:
    return Series(name, _values(lines, "step"), _values(lines, key), points, smooth)


def _values(lines: Sequence[Numbers], key: str) -> list[Any]:
    return [line.get(key) for line in lines]


def _step_s(line: Numbers) -> float:
    """Seconds of a step: as a whole where that was timed, else the sum of its parts."""
    parts = sum(v for k, v in line.items() if k.startswith("time_") and k.endswith("_s") and k != "time_step_s")
    return line.get("time_step_s", parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _or_dash(show: Any) -> Any:
    return lambda value: "-" if value is None else show(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all; a lone surrogate, which no file can hold, becomes a question mark."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
