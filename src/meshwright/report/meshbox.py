"""The plan as a drawing: the volume as a box, cut into the parts of its ranks and pulled a little apart.

W runs right and down, H right and up, D up (an isometric view), so the visible faces are the top (highest D), the
front (lowest H) and the side (highest W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from meshwright.report.records import RankRecord

_COS, _SIN = math.cos(math.pi / 6), math.sin(math.pi / 6)
_SIZE = 250.0  # the longest edge, drawing units
_GAP = 13.0
_MOST_PARTS = 512
_COLOURS = 8

Point = tuple[float, float, float]
Cell = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def mesh_box(records: Sequence[RankRecord]) -> str:
    """The parts of one sample. Ranks that hold the same part of different samples share its label."""
    owners: dict[Cell, list[int]] = {}
    for record in records:
        if all(hi > lo for lo, hi in record.interval):
            owners.setdefault(record.interval, []).append(record.rank)
    if not owners:
        return '<p class="none">The run has not written which rank holds what.</p>'
    if len(owners) > _MOST_PARTS:
        return f'<p class="none">{len(owners)} parts are too many to draw; see the table.</p>'
    starts = [sorted({cell[dim][0] for cell in owners}) for dim in range(3)]
    ends = [max(cell[dim][1] for cell in owners) for dim in range(3)]
    shape = [end - start[0] for end, start in zip(ends, starts, strict=True)]
    scale = _SIZE / max(shape)

    def place(point: Point, cell: Cell) -> tuple[float, float]:
        gaps = [starts[dim].index(cell[dim][0]) for dim in range(3)]
        return _project(*((point[dim] - starts[dim][0]) * scale + _GAP * gaps[dim] for dim in range(3)))

    drawn: list[str] = []
    outline: list[tuple[float, float]] = []
    for cell in sorted(owners, key=lambda cell: (-cell[1][0], cell[2][0], cell[0][0])):  # far ones first
        ranks, visible = owners[cell], _visible(cell, starts)
        for face, corners in _faces(cell).items():
            points = [place(corner, cell) for corner in corners]
            outline += points
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            drawn.append(f'<polygon class="face {face} c-rank{ranks[0] % _COLOURS}" points="{path}"/>')
            if face == visible:
                x, y = (sum(axis) / 4 for axis in zip(*points, strict=True))
                drawn.append(f'<text class="part" x="{x:.1f}" y="{y:.1f}" dy=".35em">{_label(ranks)}</text>')
    edges = [size * scale + _GAP * (len(start) - 1) for size, start in zip(shape, starts, strict=True)]
    left, right = min(x for x, _ in outline) - 58, max(x for x, _ in outline) + 20
    top, bottom = min(y for _, y in outline) - 8, max(y for _, y in outline) + 26
    parts = "; ".join(f"rank {_label(ranks)}" for ranks in owners.values())
    label = f"The volume of {' × '.join(map(str, shape))} voxels (D × H × W), cut into {len(owners)} parts: {parts}"
    return (
        f'<svg class="mesh" viewBox="{left:.0f} {top:.0f} {right - left:.0f} {bottom - top:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}{_edge_names(shape, edges)}</svg>'
    )


def _project(d: float, h: float, w: float) -> tuple[float, float]:
    return (w + h) * _COS, -d + (w - h) * _SIN


def _faces(cell: Cell) -> dict[str, list[Point]]:
    (d0, d1), (h0, h1), (w0, w1) = cell
    return {
        "top": [(d1, h0, w0), (d1, h0, w1), (d1, h1, w1), (d1, h1, w0)],
        "front": [(d0, h0, w0), (d0, h0, w1), (d1, h0, w1), (d1, h0, w0)],
        "side": [(d0, h0, w1), (d0, h1, w1), (d1, h1, w1), (d1, h0, w1)],
    }


def _visible(cell: Cell, starts: list[list[int]]) -> str | None:
    """The face of a part that no other part hides: where its label goes."""
    if cell[1][0] == starts[1][0]:
        return "front"
    if cell[0][0] == starts[0][-1]:
        return "top"
    return "side" if cell[2][0] == starts[2][-1] else None


def _edge_names(shape: Sequence[int], edges: Sequence[float]) -> str:
    """Name and length in voxels beside the lower and the left edges."""
    depth, height, width = edges
    spots = (
        ("D", shape[0], _project(depth / 2, 0, 0), (-9, 0), "end"),
        ("W", shape[2], _project(0, 0, width / 2), (-9, 16), "end"),
        ("H", shape[1], _project(0, height / 2, width), (9, 16), "start"),
    )
    return "".join(
        f'<text class="name" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{name} {size}</text>'
        for name, size, (x, y), (dx, dy), anchor in spots
    )


def _label(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:3])) + (", …" if len(ranks) > 3 else "")
