"""What somebody sees while a run goes on: a live panel on a terminal, one plain line per event elsewhere.

A `Display` is called with the run's events, `display(event, data)`, and knows nothing else of the run.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlzero.config.rl import Config

# What a step's line shows, in this order where the run reports it: (metric, label, format).
SHOWN = [
    ("reward_mean", "reward", "{:.3f}"),
    ("length_mean", "length", "{:.1f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl_reference", "kl", "{:.2g}"),
    ("gap", "gap", "{:.1e}"),
    ("truncated", "truncated", "{:.0%}"),
    ("worker_restarts", "restarts", "{:.0f}"),
]
COLOURS = ["blue", "dark_orange", "green", "magenta", "red", "cyan", "yellow"]
BAR = 32  # characters of the bar that shows where a step's time goes


class Display:
    """A context manager around a run. `console` defaults to standard output; live where that is a terminal."""

    def __init__(self, config: Config, console: Console | None = None):
        self._config = config
        self._console = console or Console()
        self._recent_s: deque[float] = deque(maxlen=10)
        self._step: dict[str, Any] = {}
        self._evaluations: list[dict[str, Any]] = []
        self._note = "starting"
        self._began_s = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(config.name, total=config.steps, eta="")
        self._live = Live(self, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """Takes notice of an event: `step`, `evaluation`, or anything else, which is shown as a note."""
        if event == "step":
            self._step, self._note = data, ""
            self._recent_s.append(_step_s(data))
            self._progress.update(self._task, completed=data["step"] + 1, eta=self.eta)
            self._say(self.step_line(data))
        elif event == "evaluation":
            self._evaluations.append(data)
            self._say(evaluation_line(data))
        else:
            values = ", ".join(f"{key} {value}" for key, value in data.items())
            self._note = f"{event}: {values}" if values else event
            self._say(self._note)

    @property
    def eta(self) -> str:
        """Time that the remaining steps take at the pace of the last ten."""
        if not self._recent_s or not self._step:
            return ""
        left = self._config.steps - self._step["step"] - 1
        return f"ETA {clock(left * sum(self._recent_s) / len(self._recent_s))}" if left else "done"

    def step_line(self, line: dict[str, Any]) -> str:
        """One step in one line, for logs."""
        shown = [f"{label} {form.format(line[key])}" for key, label, form in SHOWN if _worth_showing(key, line)]
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts_of(line).items() if seconds >= 0.05)
        head = f"step {line['step'] + 1}/{self._config.steps}"
        return "  ".join([head, *shown, f"{_step_s(line):.1f} s" + (f" ({parts})" if parts else ""), self.eta]).rstrip()

    def __rich__(self) -> Group:
        numbers = Table.grid(padding=(0, 3))
        for _ in SHOWN:
            numbers.add_column(justify="left")
        cells = [f"[dim]{label}[/] {f.format(self._step[k])}" for k, label, f in SHOWN if _worth_showing(k, self._step)]
        if cells:
            numbers.add_row(*cells)
        rows: list[Any] = [self._progress, numbers]
        if self._step:
            rows.append(time_bar(parts_of(self._step), _step_s(self._step)))
        if self._evaluations:
            rows.append(Text("  ".join(evaluation_line(e) for e in self._evaluations[-2:]), style="bold"))
        note = f"; {self._note}" if self._note else ""
        rows.append(Text(f"{clock(time.monotonic() - self._began_s)} so far{note}", style="dim"))
        return Group(*rows)

    def _say(self, line: str) -> None:
        if not self._live:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def counting(title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, as a function of (done, total, words); nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, words="": None
        return
    words_column = TextColumn("{task.description}")
    columns = (TextColumn(title), BarColumn(40), MofNCompleteColumn(), TimeRemainingColumn(), words_column)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total, words="": progress.update(task, completed=done, total=total, description=words)


def evaluation_line(data: dict[str, Any]) -> str:
    line = f"evaluation at step {data['step']}: pass@1 {data['pass_at_1']:.1%}"
    if data.get("cons_at_k") is not None:
        line += f", cons@{data.get('n', 'k')} {data['cons_at_k']:.1%}"
    return line


def parts_of(line: dict[str, Any]) -> dict[str, float]:
    """Seconds of every timed part of a step."""
    return {
        key[len("time_") : -len("_s")]: value
        for key, value in line.items()
        if key.startswith("time_") and key.endswith("_s") and key != "time_step_s" and value is not None
    }


def time_bar(parts: dict[str, float], total_s: float) -> Text:
    """The step's time as a coloured bar with a legend."""
    total_s = max(total_s, sum(parts.values()), 1e-9)
    text, legend, used = Text(), Text(), 0
    for index, (name, seconds) in enumerate(parts.items()):
        width = round(BAR * seconds / total_s)
        used += width
        text.append("━" * width, style=COLOURS[index % len(COLOURS)])
        legend.append(f"  {name} {seconds:.1f}", style=COLOURS[index % len(COLOURS)])
    text.append("━" * max(0, BAR - used), style="dim")
    return text + legend + Text(f"  of {total_s:.1f} s", style="dim")


def clock(seconds: float) -> str:
    """12 s, 3:05 min, 2:10 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def _step_s(line: dict[str, Any]) -> float:
    whole = line.get("time_step_s")
    return sum(parts_of(line).values()) if whole is None else whole


def _worth_showing(key: str, line: dict[str, Any]) -> bool:
    """Whether a step's line has a number there; counts of trouble are shown only where there was some."""
    value = line.get(key)
    if value is None or not math.isfinite(value):
        return False
    return value > 0 if key in ("worker_restarts", "truncated") else True
