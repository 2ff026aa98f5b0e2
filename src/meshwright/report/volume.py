"""The held-out volume from three directions: image, truth, prediction, errors, and where it is cut between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.plan.plan import Plan, interval
from meshwright.report.planes import Plane, Slices
from meshwright.report.png import data_uri
from meshwright.report.units import percent_text

# Class colours, and the colour of an error: they keep apart on grey, in both modes, for all common colour vision.
CLASS_RGB = ((128, 136, 148), (20, 160, 152), (240, 178, 60), (92, 124, 230), (186, 104, 200), (150, 190, 70))
_ERROR_RGB = (232, 52, 96)
_ACROSS = ("depth", "height", "width")
_AXES = "DHW"


@dataclass(frozen=True)
class Region:
    """The part of a plane that `ranks` hold: rows and columns of the array."""

    ranks: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]


def regions(plan: Plan, shape: tuple[int, int, int], across: int, at: int) -> tuple[Region, ...]:
    """Who holds what of plane `at` across dim `across` (0 depth, 1 height, 2 width) of a volume of `shape`."""
    row_dim, column_dim = (dim for dim in range(3) if dim != across)
    found = []
    for rank in range(plan.ranks):
        spans = [(span.start, span.stop) for span in interval(shape, plan, rank, layout="DHW")]
        whole = all(hi > lo for lo, hi in spans)
        if whole and spans[across][0] <= at < spans[across][1]:
            found.append(((spans[row_dim], spans[column_dim]), rank))
    parts = groupby(sorted(found), key=lambda entry: entry[0])  # ranks of several samples hold the same part
    return tuple(Region(tuple(rank for _, rank in group), rows, columns) for (rows, columns), group in parts)


def grey(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """`image` as grey values, the darkest and brightest half percent saturated."""
    numbers = np.nan_to_num(image.astype(np.float64))
    lo, hi = np.quantile(numbers, [0.005, 0.995])
    return np.rint(255 * np.clip((numbers - lo) / (hi - lo or 1.0), 0, 1)).astype(np.uint8)


def coloured(image: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Class colours laid over the image; class 0, the rest of the head, stays grey."""
    base = grey(image).astype(np.float64)[..., None]
    palette = np.array([CLASS_RGB[index % len(CLASS_RGB)] for index in range(int(labels.max(initial=0)) + 1)])
    over = 0.72 * palette[labels] * (0.55 + 0.45 * base / 255) + 0.28 * base
    return np.where(labels[..., None] == 0, 0.5 * base, over).astype(np.uint8)


def errors(plane: Plane) -> npt.NDArray[np.uint8]:
    """The image, dimmed, with every voxel whose predicted class is wrong in one colour."""
    base = 0.45 * grey(plane.image).astype(np.float64)[..., None].repeat(3, axis=2)
    return np.where((plane.truth != plane.prediction)[..., None], _ERROR_RGB, base).astype(np.uint8)


def gallery(slices: Slices, plan: Plan) -> str:
    """All directions, one row each, at one common scale in millimetres."""
    extent_mm = [size * step for size, step in zip(slices.shape, slices.spacing_mm, strict=True)]
    widest_mm = max(extent_mm[1], extent_mm[2])
    return "".join(
        _direction(slices, plan, across, (extent_mm[1] if across == 2 else extent_mm[2]) / widest_mm)
        for across in range(3)
    )


def _direction(slices: Slices, plan: Plan, across: int, share: float) -> str:
    plane = slices.planes[across]
    parts = regions(plan, slices.shape, across, slices.at[across])
    row_axis, column_axis = (axis for at, axis in enumerate(_AXES) if at != across)
    place = f"plane {slices.at[across] + 1} of {slices.shape[across]}"
    title = f"Across {_ACROSS[across]}, {place}; {row_axis} upwards, {column_axis} to the right"
    wrong = int((plane.truth != plane.prediction).sum())
    pictures = [
        ("image", grey(plane.image)),
        ("truth", coloured(plane.image, plane.truth)),
        ("prediction", coloured(plane.image, plane.prediction)),
        (f"errors ({percent_text(wrong, plane.truth.size)})", errors(plane)),
    ]
    size_mm = [n * step for n, step in zip(slices.shape, slices.spacing_mm, strict=True)]
    ratio = size_mm[2 if across != 2 else 1] / size_mm[0 if across != 0 else 1]
    row_dim, column_dim = (dim for dim in range(3) if dim != across)
    counts = slices.shape[row_dim], slices.shape[column_dim]
    worded = share / len({part.columns for part in parts}) >= 0.35  # else there is room for numbers only
    cells = []
    for index, (name, picture) in enumerate(pictures):
        overlay = (
            _overlay(parts, counts, [_names(part.ranks, worded) for part in parts] if index == 0 else [])
            if plan.ranks > 1
            else ""
        )
        alt = f"{name}, {title}{_owners(parts) if plan.ranks > 1 else ''}"
        cells.append(
            f'<figure class="plane" style="--share:{share:.4f}"><div class="picture" style="aspect-ratio:{ratio:.4f}">'
            f'<img src="{data_uri(np.ascontiguousarray(picture[::-1]))}" alt="{escape(alt)}">{overlay}</div>'
            f"<figcaption>{escape(name)}</figcaption></figure>"
        )
    return f'<div class="direction"><h3>{escape(title)}</h3><div class="planes">{"".join(cells)}</div></div>'


def _overlay(parts: Sequence[Region], counts: tuple[int, int], labels: Sequence[str]) -> str:
    """Lines on the cuts inside the picture (its first row is the array's last), and `labels` in the parts, if any."""
    rows, columns = counts
    lines = [f'<i class="cut across" style="top:{100 * (1 - at / rows):.3f}%"></i>' for at in _inner(parts, rows, 0)]
    lines += [f'<i class="cut along" style="left:{100 * at / columns:.3f}%"></i>' for at in _inner(parts, columns, 1)]
    for part, label in zip(parts, labels, strict=False):
        top, left = 100 * (1 - part.rows[1] / rows), 100 * part.columns[0] / columns
        width = 100 * (part.columns[1] - part.columns[0]) / columns
        lines.append(
            f'<b class="owner" style="top:{top:.3f}%;left:{left:.3f}%;max-width:calc({width:.3f}% - 8px)">{label}</b>'
        )
    return f'<div class="overlay" aria-hidden="true">{"".join(lines)}</div>'


def _inner(parts: Sequence[Region], size: int, axis: int) -> list[int]:
    starts = {(part.columns if axis else part.rows)[0] for part in parts}
    return sorted(at for at in starts if 0 < at < size)


def _names(ranks: Sequence[int], worded: bool = True) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", …" if len(ranks) > 4 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}" if worded else shown


def _owners(parts: Sequence[Region]) -> str:
    return "; held by " + " and ".join(_names(part.ranks) for part in parts)
