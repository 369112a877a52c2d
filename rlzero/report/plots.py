"""Plots as SVG text: lines over steps, and stacked bars. No plotting library, no script, no outside resource.

Colours are CSS classes (`s0` ... `s6`, see `STYLE`), so one picture serves light and dark pages. Values that are None
or NaN leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 34

# The palette keeps its order of lightness for the colour-blind; each pair is (light page, dark page).
COLOURS = [
    ("#2563c9", "#6ea8fe"),
    ("#d9730d", "#ffa94d"),
    ("#16866a", "#4fd1a5"),
    ("#8b46c1", "#c594f5"),
    ("#b3263a", "#ff8494"),
    ("#6b7280", "#a3aab5"),
    ("#0e7c9b", "#5fcbe8"),
]
_LIGHT = "".join(f"--s{i}:{light};" for i, (light, _) in enumerate(COLOURS))
_DARK = "".join(f"--s{i}:{dark};" for i, (_, dark) in enumerate(COLOURS))
VARIABLES = (
    f":root{{{_LIGHT}--ink:#1c2430;--faint:#5d6878;--line:#dde2e9;--page:#fbfcfd;--card:#ffffff;}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK}--ink:#e7ebf1;--faint:#98a3b3;--line:#2c3440;--page:#12161c;"
    "--card:#1a2029;}}"
)
STYLE = (
    "svg.plot{font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;}"
    "svg.plot text{fill:var(--faint);}svg.plot text.title{fill:var(--ink);font-weight:600;font-size:13px;}"
    "svg.plot .grid{stroke:var(--line);stroke-width:1;}svg.plot .curve{fill:none;stroke-width:2;stroke-linejoin:round;}"
    "svg.plot .raw{fill:none;stroke-width:1;opacity:.35;}svg.plot .limit{stroke:var(--faint);stroke-dasharray:4 4;}"
    + "".join(
        f"svg.plot .s{i}{{stroke:var(--s{i});}}svg.plot .f{i},svg.plot text.f{i}{{fill:var(--s{i});}}"
        for i in range(len(COLOURS))
    )
)


@dataclass(frozen=True)
class Series:
    """One named line. `points` marks every value; `smooth` draws a running mean over the faint raw line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    points: bool = False
    smooth: bool = False


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def plain(value: float) -> str:
    """Three figures at most: 0.0012, 12.5, 1.3k, 2.1M."""
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{suffix}"
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from `low` to `high`, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the values within `window // 2` positions to either side, at every position that has a value."""
    reach = window // 2
    result: list[float | None] = []
    for index, value in enumerate(values):
        around = [v for v in values[max(0, index - reach) : index + reach + 1] if v is not None]
        result.append(sum(around) / len(around) if value is not None else None)
    return result


def line_chart(
    title: str,
    series: Sequence[Series],
    y_format: Callable[[float], str] = plain,
    y_range: tuple[float | None, float | None] = (None, None),
    limit: float | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """An SVG of lines over steps; `y_range` fixes either end of the axis, `limit` draws a dashed line."""
    series = [Series(s.name, s.xs, [_known(y) for y in s.ys], s.points, s.smooth) for s in series]
    known = [y for s in series for y in s.ys if y is not None] + ([limit] if limit is not None else [])
    xs = [x for s in series for x in s.xs]
    if not known:
        return _frame(title, ["<text x='50%' y='55%' text-anchor='middle'>no values</text>"], width, height)
    low = min(known) if y_range[0] is None else y_range[0]
    high = max(known) if y_range[1] is None else y_range[1]
    if high - low < 1e-12:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    elif y_range[1] is None:
        high += 0.05 * (high - low)
    place = _Scale(min(xs), max(xs), low, high, width, height)
    body = _axes(place, ticks(low, high), ticks(min(xs), max(xs), 6), y_format)
    if limit is not None:
        y = place.y(limit)
        body.append(f"<line class='limit' x1='{LEFT}' x2='{width - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
    for index, line in enumerate(series):
        colour = index % len(COLOURS)
        shown = line.ys
        if line.smooth and len(line.ys) >= 10:
            body.append(f"<path class='raw s{colour}' d='{_path(place, line.xs, line.ys)}'/>")
            shown = running_mean(line.ys, max(3, len(line.ys) // 20))
        body.append(f"<path class='curve s{colour}' d='{_path(place, line.xs, shown)}'/>")
        if line.points or sum(y is not None for y in line.ys) == 1:
            for x, y in zip(line.xs, line.ys, strict=True):
                if y is not None:
                    tip = escape(f"step {x:g}: {line.name} {y_format(y)}")
                    body.append(
                        f"<circle class='f{colour}' cx='{place.x(x):.1f}' cy='{place.y(y):.1f}' r='3.5'>"
                        f"<title>{tip}</title></circle>"
                    )
    body += _legend([s.name for s in series], width) if len(series) > 1 else []
    return _frame(title, body, width, height)


def stacked_bars(
    title: str,
    xs: Sequence[float],
    parts: dict[str, Sequence[float | None]],
    y_format: Callable[[float], str] = plain,
    width: int = WIDTH,
    height: int = HEIGHT,
    bins: int = 120,
) -> str:
    """An SVG with one bar a step, its parts on top of each other; more than `bins` steps are averaged in groups."""
    values = {name: [_known(y) or 0.0 for y in ys] for name, ys in parts.items()}
    if not xs or not values:
        return _frame(title, ["<text x='50%' y='55%' text-anchor='middle'>no values</text>"], width, height)
    size = -(-len(xs) // bins)
    groups = [range(start, min(start + size, len(xs))) for start in range(0, len(xs), size)]
    bars = [(xs[g[0]], {n: sum(ys[i] for i in g) / len(g) for n, ys in values.items()}) for g in groups]
    high = max(sum(bar.values()) for _, bar in bars) * 1.05 or 1.0
    pitch = (xs[-1] - xs[0]) / max(len(bars) - 1, 1) or 1.0
    place = _Scale(xs[0] - pitch / 2, xs[-1] + pitch / 2, 0.0, high, width, height)
    body = _axes(place, ticks(0.0, high), ticks(xs[0], xs[-1], 6), y_format)
    thick = max(1.0, (place.x(pitch) - place.x(0)) * 0.86)
    for x, bar in bars:
        base = 0.0
        label = escape(f"step {x:g}: " + ", ".join(f"{n} {y_format(v)}" for n, v in bar.items() if v))
        body.append(f"<g><title>{label}</title>")
        for index, value in enumerate(bar.values()):
            if value > 0:
                top, bottom = place.y(base + value), place.y(base)
                body.append(
                    f"<rect class='f{index % len(COLOURS)}' x='{place.x(x) - thick / 2:.1f}' y='{top:.1f}' "
                    f"width='{thick:.1f}' height='{bottom - top:.1f}'/>"
                )
                base += value
        body.append("</g>")
    body += _legend(list(values), width)
    return _frame(title, body, width, height)


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    height: int

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return LEFT + (value - self.x_low) / span * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - BOTTOM - min(max(share, 0.0), 1.0) * (self.height - TOP - BOTTOM)


def _axes(place: _Scale, y_ticks: list[float], x_ticks: list[float], y_format: Callable[[float], str]) -> list[str]:
    body = []
    for value in y_ticks:
        y = place.y(value)
        body.append(f"<line class='grid' x1='{LEFT}' x2='{place.width - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        body.append(f"<text x='{LEFT - 7}' y='{y + 4:.1f}' text-anchor='end'>{escape(y_format(value))}</text>")
    for value in x_ticks:
        if value == int(value):
            at = f"x='{place.x(value):.1f}' y='{place.height - BOTTOM + 17}'"
            body.append(f"<text {at} text-anchor='middle'>{int(value)}</text>")
    body.append(f"<text x='{place.width - RIGHT}' y='{place.height - 3}' text-anchor='end'>step</text>")
    return body


def _legend(names: Sequence[str], width: int) -> list[str]:
    """Names in the colour of their line, right-aligned on the title's line."""
    body, x = [], float(width - RIGHT)
    for index, name in reversed(list(enumerate(names))):
        body.append(f"<text class='f{index % len(COLOURS)}' x='{x:.0f}' y='16' text-anchor='end'>{escape(name)}</text>")
        x -= 7.0 * len(name) + 12
    return body


def _path(place: _Scale, xs: Sequence[float], ys: Sequence[float | None]) -> str:
    parts, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{place.x(x):.1f} {place.y(y):.1f}")
        pen_down = True
    return "".join(parts)


def _frame(title: str, body: list[str], width: int, height: int) -> str:
    return (
        f"<svg class='plot' xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='{escape(title, quote=True)}'><text class='title' x='4' y='16'>{escape(title)}</text>"
        + "".join(body)
        + "</svg>"
    )


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
