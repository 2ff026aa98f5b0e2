"""HTML tables: numbers right-aligned, bars inside cells, everything from outside escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MOST_ROWS = 24


@dataclass(frozen=True)
class Html:
    """Markup made by us; every other text is escaped."""

    markup: str


@dataclass(frozen=True)
class Column:
    """A column: its title, and whether it holds text ("text"), numbers ("num") or bars ("bar")."""

    title: str
    kind: str = "num"


Cell = str | Html


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], marked: Sequence[bool] = ()) -> str:
    """A table that scrolls sideways on a narrow screen; `marked[i]` highlights row `i`, the first column heads it."""
    head = "".join(f'<th scope="col" class="{column.kind}">{escape(column.title)}</th>' for column in columns)
    body = []
    for index, row in enumerate(rows):
        cells = [_cell(column, cell, first=at == 0) for at, (column, cell) in enumerate(zip(columns, row, strict=True))]
        mark = ' class="marked"' if index < len(marked) and marked[index] else ""
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], marked: Sequence[bool] = ()) -> str:
    """`table`, the rows after the first `MOST_ROWS` folded away."""
    shown = table(caption, columns, rows[:MOST_ROWS], marked[:MOST_ROWS])
    if len(rows) <= MOST_ROWS:
        return shown
    rest = table(f"{caption} (continued)", columns, rows[MOST_ROWS:], marked[MOST_ROWS:])
    return f"{shown}<details><summary>{len(rows) - MOST_ROWS:,} more</summary>{rest}</details>"


def bar(parts: Sequence[tuple[float, str]], whole: float, tick: float | None = None) -> Html:
    """A bar of `parts` (value, colour) one after the other on the scale 0 … `whole`; `tick` is the ideal."""
    scale = 100 / whole if whole else 0.0
    at, drawn = 0.0, []
    for value, colour in parts:
        drawn.append(f'<rect class="bar c-{colour}" x="{at:.2f}" y="2" width="{value * scale:.2f}" height="8"/>')
        at += value * scale
    if tick is not None:
        x = min(99.4, tick * scale)
        drawn.append(f'<rect class="ideal" x="{max(0.0, x - 0.3):.2f}" y="0" width="0.6" height="12"/>')
    return Html(
        '<svg class="inbar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" x="0" y="2" width="100" height="8"/>{"".join(drawn)}</svg>'
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values side by side."""
    return '<dl class="facts">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs) + "</dl>"


def _cell(column: Column, cell: Cell, *, first: bool) -> str:
    inner = cell.markup if isinstance(cell, Html) else escape(cell)
    return f'<th scope="row" class="{column.kind}">{inner}</th>' if first else f'<td class="{column.kind}">{inner}</td>'
