"""The frame of a chart: where a value lies on the drawing, and which values get a tick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560.0, 66.0, 10.0, 12.0, 44.0


@dataclass(frozen=True)
class Frame:
    """A drawing of `WIDTH` × `height` units whose inner part spans `x` and `y` (each lowest, highest value)."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def px(self, value: float) -> float:
        """Horizontal place of `value`."""
        lo, hi = self.x
        return LEFT + (value - lo) / (hi - lo) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        """Vertical place of `value`; larger values lie higher, those beyond the frame at its edge."""
        lo, hi = self.y
        share = min(1.0, max(0.0, (value - lo) / (hi - lo)))
        return self.bottom - share * (self.bottom - TOP)

    def draw(self, x_label: str, y_label: str) -> str:
        """Grid lines, ticks and the names of both axes."""
        parts = []
        for value, text in ticks(*self.y, 5):
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{y:.1f}" dy=".32em" text-anchor="end">{text}</text>')
        for value, text in ticks(*self.x, 6, whole=True):
            x = self.px(value)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.bottom:g}" y2="{self.bottom + 5:g}"/>'
            )
            parts.append(f'<text class="tick" x="{x:.1f}" y="{self.bottom + 19:g}" text-anchor="middle">{text}</text>')
        middle = (TOP + self.bottom) / 2
        parts.append(
            f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{self.bottom:g}" y2="{self.bottom:g}"/>'
            f'<text class="name" x="{WIDTH - RIGHT:g}" y="{self.height - 6:g}" text-anchor="end">'
            f"{escape(x_label)}</text>"
            f'<text class="name" transform="translate(11 {middle:g}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)


def ticks(lo: float, hi: float, count: int, *, whole: bool = False) -> Iterator[tuple[float, str]]:
    """About `count` round values in [`lo`, `hi`] with their text; `whole` allows whole numbers only."""
    step = _round_step((hi - lo) / count)
    if whole:
        step = max(1.0, math.ceil(step))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:  # 2.5, 0.25, …
        decimals += 1
    for index in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1):
        value = index * step
        if step >= 1e-4:
            yield value, f"{value:,.{decimals}f}"
        else:  # as many digits as tell neighbours apart
            digits = math.floor(math.log10(max(abs(value), step))) - math.floor(math.log10(step) + 1e-9) + 1
            yield value, f"{value:.{digits}e}" if index else "0"


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 × a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def padded(values: list[float], lo: float | None = None, hi: float | None = None) -> tuple[float, float]:
    """A range that holds all finite `values` with a little room; `lo` and `hi` fix an end."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    low, high = (low - room if lo is None else lo), (high + room if hi is None else hi)
    return (low, high) if high > low else (low, low + 1.0)
