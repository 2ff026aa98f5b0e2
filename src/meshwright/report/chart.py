"""Charts over the steps of a run, as SVG of our own: curves, and bars stacked per step.

Colours are names of style.css (`c-…`). The numbers travel along in `data-hover` for the pointer (page.js).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from meshwright.report.axes import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Frame, padded
from meshwright.report.timing import percentile

_MOST_POINTS = 800  # more than the pixels of a curve
_MOST_BARS = 200
_FEWEST_SMOOTHED = 24  # the mean of so few would only bend the curve


@dataclass(frozen=True)
class Series:
    """Values `y` at the steps `x`. `style`: "curve" (raw, with a smooth line over it) or "points"."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "curve"


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a fifteenth of the curve: unlike a running average it does not lag behind.

    The window shrinks towards the ends, and skips what is not finite.
    """
    half = max(1, len(values) // 30)
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        near = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        result.append(fmean(near) if near else math.nan)
    return result


def curves(
    label: str,
    series: Sequence[Series],
    *,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    height: float = 280.0,
) -> str:
    """Curves over the step: raw values faint, a smooth line over them, points joined by a thin line."""
    shown = [one for one in (_thinned(one) for one in series) if one.x]
    if not shown:
        return '<p class="none">No step was logged yet.</p>'
    first, last = min(one.x[0] for one in shown), max(one.x[-1] for one in shown)
    span = (float(first), float(last)) if last > first else (first - 1.0, last + 1.0)
    frame = Frame(span, padded([value for one in shown for value in one.y], *y_range), height)
    drawn = "".join(_points(frame, one) if one.style == "points" else _curve(frame, one) for one in shown)
    return _figure(label, frame, frame.draw("step", y_label) + drawn, shown, "")


def stacked(
    label: str, steps: Sequence[int], parts: Sequence[Series], *, y_label: str, unit: str, height: float = 280.0
) -> str:
    """One bar per step (or per few steps, averaged), the parts on top of one another in their order.

    A rare tall bar, such as the first step, is cut at the frame, which fits all but the tallest twentieth.
    """
    if not steps:
        return '<p class="none">No step was logged yet.</p>'
    group = -(-len(steps) // _MOST_BARS)
    x = [float(steps[i]) for i in range(0, len(steps), group)]
    binned = [
        Series(p.name, p.colour, x, [_mean(p.y[i : i + group]) for i in range(0, len(steps), group)]) for p in parts
    ]
    sums = [sum(column) for column in zip(*(part.y for part in binned), strict=True)]
    top = min(1.05 * max(sums), 1.25 * percentile(sums, 0.95)) or 1.0
    width = x[1] - x[0] if len(x) > 1 else 1.0
    frame = Frame((x[0] - width / 2, x[-1] + width / 2), (0.0, top), height)
    gap = 0.2 if len(x) <= 60 else 0.0
    floor = [0.0] * len(x)
    drawn = []
    for part in binned:
        boxes = []
        for i, (at, value) in enumerate(zip(x, part.y, strict=True)):
            left, right = frame.px(at - width * (1 - gap) / 2), frame.px(at + width * (1 - gap) / 2)
            y0, y1 = frame.py(floor[i]), frame.py(floor[i] + value)
            boxes.append(f"M{left:.2f} {y0:.2f}H{right:.2f}V{y1:.2f}H{left:.2f}z")
            floor[i] += value
        drawn.append(f'<path class="bar c-{part.colour}" d="{"".join(boxes)}"/>')
    drawn += [
        f'<path class="cutoff" d="M{frame.px(at) - 4:.1f} {TOP - 2:g}h8l-4 -7z"/>'
        for at, total in zip(x, sums, strict=True)
        if total > top
    ]
    return _figure(label, frame, frame.draw("step", y_label) + "".join(drawn), binned, unit)


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """`entries`: (name, colour, mark), where mark is one of line, raw, dot, box, tick."""
    items = "".join(
        f'<li class="c-{colour}"><i class="key {mark}"></i>{escape(name)}</li>' for name, colour, mark in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _figure(label: str, frame: Frame, inner: str, series: Sequence[Series], unit: str) -> str:
    hover = {
        "frame": [LEFT, WIDTH - RIGHT, TOP, frame.height - BOTTOM, *frame.x],
        "unit": unit,
        "series": [
            {
                "name": s.name,
                "colour": s.colour,
                "x": list(s.x),
                "y": [float(f"{v:.4g}") if math.isfinite(v) else None for v in s.y],
            }
            for s in series
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {frame.height:g}" role="img" aria-label="{escape(label)}" '
        f'data-hover="{escape(json.dumps(hover, separators=(",", ":")))}">{inner}</svg>'
    )


def _curve(frame: Frame, series: Series) -> str:
    raw = _path(frame, series.x, series.y)
    if len(series.x) < _FEWEST_SMOOTHED:
        return f'<path class="line c-{series.colour}" d="{raw}"/>'
    line = _path(frame, series.x, smooth(series.y))
    return f'<path class="raw c-{series.colour}" d="{raw}"/><path class="line c-{series.colour}" d="{line}"/>'


def _points(frame: Frame, series: Series) -> str:
    dots = "".join(
        f'<circle class="dot c-{series.colour}" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="4"/>'
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(y)
    )
    return f'<path class="join c-{series.colour}" d="{_path(frame, series.x, series.y)}"/>{dots}'


def _path(frame: Frame, x: Sequence[float], y: Sequence[float]) -> str:
    """A polyline that is broken where a value is not finite."""
    commands, pen = [], "M"
    for at, value in zip(x, y, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        commands.append(f"{pen}{frame.px(at):.1f} {frame.py(value):.1f}")
        pen = "L"
    return "".join(commands)


def _thinned(series: Series) -> Series:
    group = -(-len(series.x) // _MOST_POINTS)
    if group <= 1:
        return series
    starts = range(0, len(series.x), group)
    x = [series.x[min(i + group // 2, len(series.x) - 1)] for i in starts]
    return Series(series.name, series.colour, x, [_mean(series.y[i : i + group]) for i in starts], series.style)


def _mean(values: Sequence[float]) -> float:
    return fmean(values)
