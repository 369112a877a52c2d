"""Plots as SVG, drawn by matplotlib. Their colours are CSS variables (`VARIABLES`): one picture for light and dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

SIZE = (520, 250)  # of a plot, in pixels at which its text has 12 of them
# The palette keeps its order of lightness for the colour-blind; each pair is (light page, dark page).
COLOURS = [
    ("#2563c9", "#6ea8fe"), ("#d9730d", "#ffa94d"), ("#16866a", "#4fd1a5"), ("#8b46c1", "#c594f5"),
    ("#b3263a", "#ff8494"), ("#6b7280", "#a3aab5"), ("#0e7c9b", "#5fcbe8"), ("#7a5c1e", "#d9bb73"),
]  # fmt: skip
_LIGHT = "".join(f"--s{i}:{light};" for i, (light, _) in enumerate(COLOURS))
_DARK = "".join(f"--s{i}:{dark};" for i, (_, dark) in enumerate(COLOURS))
VARIABLES = (
    f":root{{{_LIGHT}--ink:#1c2430;--faint:#5d6878;--line:#dde2e9;--page:#fbfcfd;--card:#ffffff}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK}--ink:#e7ebf1;--faint:#98a3b3;--line:#2c3440;--page:#12161c;"
    "--card:#1a2029}}"
)
# What matplotlib is told in place of a variable; `_svg` puts the variable there.
INK, FAINT, LINE = "#0f0ff1", "#0f0ff2", "#0f0ff3"
_MARKS = {INK: "--ink", FAINT: "--faint", LINE: "--line", **{f"#0f0fe{i}": f"--s{i}" for i in range(len(COLOURS))}}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "rlzero", "text.parse_math": False, "font.size": 12,
    "axes.prop_cycle": matplotlib.cycler(color=[f"#0f0fe{i}" for i in range(len(COLOURS))]),
    "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LINE, "xtick.color": FAINT, "ytick.color": FAINT,
    "text.color": FAINT, "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False,
    "legend.labelcolor": "linecolor",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One named line over steps; None leaves a gap. `points` marks every value, `smooth` draws a running mean over the
    faint values."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    points: bool = False
    smooth: bool = False


def plain(value: float) -> str:
    """Three figures at most: 0.0012, 12.5, 1.3k, 2.1M."""
    for limit, divisor, suffix in ((1e12, 0, ""), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{suffix}" if divisor else f"{value:.1e}"
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the values within `window // 2` positions to either side, at every position that has a value."""
    reach = window // 2
    around = [[v for v in values[max(0, i - reach) : i + reach + 1] if v is not None] for i in range(len(values))]
    return [None if v is None else sum(a) / len(a) for v, a in zip(values, around, strict=True)]


def line_chart(
    series: Sequence[Series], share: bool = False, from_zero: bool = False, size: tuple[int, int] = SIZE
) -> str:
    """Lines over steps as SVG; the axis shows a `share` from 0 to 100 %, or begins at 0, or fits the values."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(size)
        for line in series:
            ys = np.array([np.nan if y is None else y for y in line.ys], dtype=float)
            single, name = line.points or np.isfinite(ys).sum() == 1, _label(line.name)
            if line.smooth and len(ys) >= 10:
                (raw,) = axes.plot(line.xs, ys, linewidth=1, alpha=0.35)
                mean = running_mean(line.ys, max(3, len(ys) // 20))
                axes.plot(line.xs, [np.nan if y is None else y for y in mean], color=raw.get_color(), label=name)
            else:
                axes.plot(line.xs, ys, marker="o" if single else None, markersize=5, label=name)
        if share:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        elif from_zero:
            axes.set_ylim(bottom=0)
        return _svg(figure, axes, legend=len(series) > 1)


def stacked(
    xs: Sequence[float], parts: dict[str, Sequence[float | None]], share: bool = False, size=SIZE, first: int = 0
) -> str:
    """The parts of a whole on top of each other, step by step, as SVG; the colours are those from `first` on."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(size)
        half = min(np.diff(xs), default=1.0) / 2
        edges = [xs[0] - half, *((a + b) / 2 for a, b in zip(xs, xs[1:], strict=False)), xs[-1] + half]
        top = np.zeros(len(xs))
        for index, (name, values) in enumerate(parts.items(), start=first):
            base, top = top, top + np.array([y or 0.0 for y in values])
            axes.stairs(top, edges, baseline=base, fill=True, label=_label(name), color=f"C{index}")
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0, y=0.03)
        axes.set_ylim(bottom=0)
        return _svg(figure, axes, legend=True)


def _label(name: str) -> str:
    """A name as a legend can hold it: printable, short, and not hidden by a leading underscore."""
    return "".join(c for c in name if c.isprintable())[:40].lstrip("_") or "?"


def _figure(size: tuple[int, int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", loc="right")
    axes.xaxis.label.set_color(FAINT)
    return figure, axes


def _svg(figure: Figure, axes: Axes, legend: bool) -> str:
    """The figure as one <svg> element whose ids are its own on a page with others."""
    if legend:
        entries = axes.get_legend_handles_labels()[1]
        columns = max(1, int(figure.get_figwidth() * 11) // (5 + max(len(name) for name in entries)))
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.5, borderaxespad=0)
    file = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=about)
    text = file.getvalue()
    text = re.sub("|".join(_MARKS), lambda found: f"var({_MARKS[found[0]]})", text[text.index("<svg") :])
    own = f"{zlib.crc32(text.encode()):x}"
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>i{own}", text).replace("<svg ", "<svg class='plot' ", 1)
