"""A run as one self-contained HTML page, its summary as JSON, and its curve as one SVG.

`write_report("runs/demo")` reads what `RunLog` wrote there and leaves `report.html` and `summary.json` beside it. The
page needs nothing from outside and follows the reader's light or dark setting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from rlzero.config.read import UsageError
from rlzero.report import plots as curves
from rlzero.report.log import RunLog, read_lines
from rlzero.report.plots import Series, line_chart, percent, plain, stacked_bars

__all__ = ["RunLog", "curve_svg", "summary", "write_report"]

# Parts of a step in the order they happen; what a run times besides them follows.
PARTS = ("generate", "rollout", "score", "train", "sync", "save", "eval")
# What a run on GPUs says of memory: `memory_<name>_bytes`.
MEMORY = {
    "planned": "planned, a trainer's GPU",
    "device": "held of it, all processes",
    "trainer_reserved": "trainer",
    "engine_reserved": "engine",
}


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` and `summary.json` into `run_dir` and returns the page's path."""
    run_dir = Path(run_dir)
    figures = summary(run_dir)
    _write(run_dir / "summary.json", json.dumps(figures, indent=2) + "\n")
    page = run_dir / "report.html"
    _write(page, _page(run_dir, figures))
    return page


def summary(run_dir: str | Path) -> dict[str, Any]:
    """The run in figures. `wall_s` counts the steps and the evaluations, over all of a resumed run's parts; what is
    not known (a run without evaluation) is None."""
    run_dir = Path(run_dir)
    steps, evaluations = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "evals.jsonl")
    if not steps and not evaluations:
        raise UsageError(f"{run_dir}: no run has written here (no metrics.jsonl or evals.jsonl with a line in it)")
    config = _config(run_dir)
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    after = last if len(evaluations) > 1 else {}
    tokens = sum(line.get("rollout_tokens") or line.get("tokens") or 0 for line in steps)
    return {
        "name": config.get("name", run_dir.name),
        "seed": config.get("seed"),
        "steps": len(steps),
        "pass_at_1_before": first.get("pass_at_1"),
        "pass_at_1_after": after.get("pass_at_1"),
        "cons_at_k_before": first.get("cons_at_k"),
        "cons_at_k_after": after.get("cons_at_k"),
        "evaluation_prompts": last.get("prompts"),
        "evaluation_samples": last.get("n"),
        "wall_s": round(sum(_step_s(line) for line in steps) + sum(e.get("time_s") or 0.0 for e in evaluations), 3),
        "rollout_tokens": int(tokens),
        "reward_first": steps[0].get("reward_mean") if steps else None,
        "reward_last": steps[-1].get("reward_mean") if steps else None,
    }


def curve_svg(run_dir: str | Path, path: str | Path) -> Path:
    """pass@1 and cons@k of the held-out questions over the run's steps as one SVG file, for a README, with the mean of
    every checker that gives shares (0 to 1) in training; returns `path`."""
    run_dir, path = Path(run_dir), Path(path)
    steps, evaluations = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "evals.jsonl")
    chart = line_chart(
        "Held-out questions and training rewards",
        _pass_series(evaluations) + [s for s in _checker_series(steps) if all(0 <= (y or 0) <= 1 for y in s.ys)],
        percent,
        (0.0, 1.0),
        width=760,
        height=320,
    )
    style = f"<style>{curves.VARIABLES}{curves.STYLE}</style>"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, chart.replace("<text class='title'", style + "<text class='title'", 1))
    return path


# --- the page --------------------------------------------------------------------------------------------------------

PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:18px;margin:34px 0 10px}
.lead{font-size:17px;margin:0 0 18px;color:var(--faint)}.lead b{color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:21px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--faint);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:12px}
.wide{grid-column:1/-1}.plots svg{width:100%;height:auto;display:block}
.note{color:var(--faint);font-size:13px;margin:4px 0 0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:12px;align-items:start}
.columns h3{margin:0 0 6px;font-size:15px}
.question{color:var(--faint);white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 8px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:0;max-height:340px;overflow:auto}
.completion{border-top:1px solid var(--line);padding:9px 0}
.completion header{display:flex;gap:8px;align-items:center;margin-bottom:5px;font-size:13px;color:var(--faint);
flex-wrap:wrap}
.verdict{border-radius:99px;padding:1px 9px;font-weight:600;border:1px solid var(--s5);color:var(--s5)}
.verdict.correct{border-color:var(--s2);color:var(--s2)}.verdict.wrong,.verdict.unparsed{border-color:var(--s4);color:var(--s4)}
pre .think{color:var(--faint)}pre .answer{font-weight:700}
summary{cursor:pointer;font-weight:600}
"""


def _page(run_dir: Path, figures: dict[str, Any]) -> str:
    steps, evaluations = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "evals.jsonl")
    samples = read_lines(run_dir / "samples.jsonl")
    config_file = run_dir / "config.yaml"
    config = (
        f"<h2>Configuration</h2><details class='card'><summary>everything this run was told</summary>"
        f"<pre>{escape(config_file.read_text())}</pre></details>"
        if config_file.exists()
        else ""
    )
    *narrow, wide = _plots(steps, evaluations)
    plots = "".join(f"<div class='card'>{svg}</div>" for svg in narrow) + f"<div class='card wide'>{wide}</div>"
    name = escape(str(figures["name"]))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{name}: rlzero run</title>"
        f"<style>{curves.VARIABLES}{curves.STYLE}{PAGE_STYLE}</style></head><body><main>"
        f"<h1>{name}</h1><p class='lead'>{_lead(figures)}</p><div class='tiles'>{_tiles(figures, steps)}</div>"
        f"<h2>While it learned</h2><div class='plots'>{plots}</div>"
        "<p class='note'>A faint line is the value of each step, the strong one its running mean. Point at a mark or a "
        "bar for its figures.</p>"
        f"{_samples(samples)}{config}</main></body></html>\n"
    )


def _lead(figures: dict[str, Any]) -> str:
    """The run in one sentence."""
    length = f"{figures['steps']} steps, {_duration(figures['wall_s'])}"
    before, after = figures["pass_at_1_before"], figures["pass_at_1_after"]
    if before is None or after is None:
        return length
    questions = (
        f"{figures['evaluation_prompts']} held-out questions" if figures["evaluation_prompts"] else "held-out questions"
    )
    return f"pass@1 on {questions}: <b>{100 * before:.1f} %</b> before, <b>{100 * after:.1f} %</b> after {length}."


def _tiles(figures: dict[str, Any], steps: Sequence[dict]) -> str:
    k = figures["evaluation_samples"] or "k"
    written_s = sum(line.get("time_generate_s") or line.get("time_rollout_s") or 0.0 for line in steps)
    gaps = [line["gap"] for line in steps if line.get("gap") is not None]
    tiles = [
        ("pass@1 before", _or_dash(figures["pass_at_1_before"], lambda v: f"{100 * v:.1f} %")),
        ("pass@1 after", _or_dash(figures["pass_at_1_after"], lambda v: f"{100 * v:.1f} %")),
        (f"cons@{k} before", _or_dash(figures["cons_at_k_before"], lambda v: f"{100 * v:.1f} %")),
        (f"cons@{k} after", _or_dash(figures["cons_at_k_after"], lambda v: f"{100 * v:.1f} %")),
        ("wall time", _duration(figures["wall_s"])),
        ("tokens written", plain(figures["rollout_tokens"])),
        ("tokens/s writing", plain(figures["rollout_tokens"] / written_s) if written_s else "-"),
        ("worst engine gap", plain(max(gaps)) if gaps else "-"),
        ("seed", str(figures["seed"])),
    ]
    return "".join(
        f"<div class='card tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles
    )


def _plots(steps: Sequence[dict], evaluations: Sequence[dict]) -> list[str]:
    gap_names = {"gap": "mean |Δ logprob|", "gap_k3": "k3", "gap_outside": "share outside [0.5, 2]"}
    gaps = [_series(steps, key, label) for key, label in gap_names.items() if _has(steps, key)]
    length = [_series(steps, "length_mean", "tokens", smooth=True)]
    held = [_series(steps, f"memory_{key}_bytes", label) for key, label in MEMORY.items()]
    held = [series for series in held if any(y is not None for y in series.ys)]
    memory = [line_chart("GPU memory, bytes: planned and measured", held, y_range=(0.0, None))] if held else []
    return [
        line_chart("Held-out questions: pass@1 and cons@k", _pass_series(evaluations), percent, (0.0, 1.0)),
        line_chart("Reward", _reward_series(steps)),
        line_chart("Completion length, tokens", length, y_range=(0.0, None)),
        line_chart("KL to the reference", [_series(steps, "kl_reference", "kl", smooth=True)]),
        line_chart("Entropy, nats per token", [_series(steps, "entropy", "entropy", smooth=True)], y_range=(0.0, None)),
        line_chart("Gap between engine and trainer", gaps, y_range=(0.0, None)),
        *memory,
        stacked_bars("Time of a step, seconds", [line["step"] for line in steps], _parts(steps), width=1150),
    ]


def _pass_series(evaluations: Sequence[dict]) -> list[Series]:
    k = evaluations[-1].get("n", "k") if evaluations else "k"
    return [
        _series(evaluations, "pass_at_1", "pass@1", points=True),
        _series(evaluations, "cons_at_k", f"cons@{k}", points=True),
    ]


def _reward_series(steps: Sequence[dict]) -> list[Series]:
    parts = _checker_series(steps)
    return [_series(steps, "reward_mean", "mean reward", smooth=True), *(parts if len(parts) > 1 else [])]


def _checker_series(steps: Sequence[dict]) -> list[Series]:
    """The mean of every checker; `reward/<name>` is one, `reward/<name>/<metric>` a detail of it."""
    checkers = sorted({key for line in steps for key in line if key.startswith("reward/") and key.count("/") == 1})
    return [_series(steps, key, key.removeprefix("reward/"), smooth=True) for key in checkers]


def _parts(steps: Sequence[dict]) -> dict[str, list[float | None]]:
    """Seconds of every part of a step that was timed, and what is left of the step's whole time."""
    timed = {key[len("time_") : -len("_s")] for line in steps for key in line if key.startswith("time_")} - {"step"}
    names = [n for n in PARTS if n in timed] + sorted(timed - set(PARTS))
    parts = {name: [line.get(f"time_{name}_s") for line in steps] for name in names}
    if _has(steps, "time_step_s"):
        known = [sum(line.get(f"time_{n}_s") or 0.0 for n in names) for line in steps]
        parts["rest"] = [max(0.0, (line.get("time_step_s") or 0.0) - k) for line, k in zip(steps, known, strict=True)]
    return parts


def _samples(samples: Sequence[dict]) -> str:
    """Start, middle and end of the run side by side."""
    if not samples:
        return ""
    chosen = {"Start": samples[0], "Middle": samples[len(samples) // 2], "End": samples[-1]}
    columns = []
    for title, sample in chosen.items():
        completions = "".join(_completion(c) for c in sample["completions"])
        columns.append(
            f"<div class='card'><h3>{title}: step {sample['step']}</h3>"
            f"<p class='question'>{escape(_question(sample['prompt']))}</p>{completions}</div>"
        )
    return f"<h2>What it wrote</h2><div class='columns'>{''.join(columns)}</div>"


def _completion(completion: dict) -> str:
    judged = next((s for s in completion.get("scores", []) if s is not None), None)
    verdict = judged["verdict"] if judged else "not scored"
    values = ", ".join("-" if s is None else plain(s["value"]) for s in completion.get("scores", []))
    reward = plain(completion["reward"]) if completion.get("reward") is not None else values
    return (
        f"<div class='completion'><header><span class='verdict {escape(verdict)}'>{escape(verdict)}</span>"
        f"<span>reward {escape(reward or '-')}</span><span>{completion.get('tokens', '?')} tokens</span></header>"
        f"<pre>{_marked(completion['text'])}</pre></div>"
    )


def _marked(text: str) -> str:
    """The completion with its reasoning dimmed and its answer strong."""
    thought, close, rest = text.partition("</think>")
    if not close:
        return f"<span class='think'>{escape(text)}</span>" if "<think>" in text else escape(text)
    return f"<span class='think'>{escape(thought + close)}</span><span class='answer'>{escape(rest)}</span>"


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


# --- small things ----------------------------------------------------------------------------------------------------


def _series(lines: Sequence[dict], key: str, name: str, points: bool = False, smooth: bool = False) -> Series:
    return Series(name, [line["step"] for line in lines], [line.get(key) for line in lines], points, smooth)


def _has(lines: Sequence[dict], key: str) -> bool:
    return any(line.get(key) is not None for line in lines)


def _step_s(line: dict) -> float:
    """Seconds of a step: as a whole where that was timed, else the sum of its parts."""
    if line.get("time_step_s") is not None:
        return line["time_step_s"]
    return sum(v or 0.0 for k, v in line.items() if k.startswith("time_") and k.endswith("_s"))


def _config(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _or_dash(value: float | None, show) -> str:
    return "-" if value is None else show(value)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
