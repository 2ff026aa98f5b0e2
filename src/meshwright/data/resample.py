"""Values between voxels, with the same bits wherever the sample is cut.

Coordinates are computed in fp64 from global positions, every sum in one fixed order and one rounding at a time, and
the neighbours of a voxel are looked up one by one. `grid_sample` would not do: its coordinates are fractions of the
size of the tensor it is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from meshwright.data.transforms import WORDS, Box, Fields, Shape, sizes
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval

_SLAB = 1 << 18  # voxels resampled at once

Coordinates = Callable[[Box], list[Tensor]]  # output box -> global input coordinate along each dim, fp64
Fill = tuple[float | None, int]  # for images (None: the edge goes on) and for labels


def reached(low: float, high: float, size: int) -> Interval:
    """Voxels that linear or nearest interpolation reads at coordinates low … high of a dim; at least one."""
    low, high = (min(max(coordinate, 0.0), size - 1.0) for coordinate in (low, high))
    return Interval(math.floor(low), min(math.floor(high) + 2, size))


def see_reach(what: str, moves: Sequence[float], halo: float) -> None:
    """Raise `DataError` if voxels move further than `halo` along some dim."""
    for name, move in zip(WORDS[-len(moves) :], moves, strict=True):
        if move > halo:
            raise DataError(
                f"{what} moves voxels by up to {move:.1f} along {name}, more than the halo of {halo:g} that was "
                "stated: allow a wider one (halo=…), draw smaller numbers, or crop to what is trained on"
            )


def resample(
    part: Fields, source: Box, box: Box, shape: Shape, at: Coordinates, fill: Fill, nearest: Sequence[str]
) -> dict[str, Tensor]:
    """`box` of the output: every field at the coordinates `at(box)` of the input, of which `part` holds `source`.

    Images are interpolated linearly between the 2 voxels of each dim; labels (whole numbers, and fields named in
    `nearest`) take the nearest voxel. Outside of the volume comes the first number of `fill` in fields of floating
    point and the second in labels, or, if the first is None, the voxel at the edge.
    """
    found = {
        name: field.new_empty((*field.shape[: field.ndim - len(box)], *sizes(box))) for name, field in part.items()
    }
    if not math.prod(sizes(box)):
        return found
    for slab in _slabs(box):
        here = slice(slab[0].lo - box[0].lo, slab[0].hi - box[0].lo)
        coordinates = torch.broadcast_tensors(*at(slab))
        if fill[0] is None:
            coordinates = tuple(x.clamp(0, size - 1) for x, size in zip(coordinates, shape, strict=True))
        corners = [x.floor() for x in coordinates]
        for name, field in part.items():
            look = _Lookup(field, source, shape, fill)
            if name in nearest or not field.is_floating_point():
                _rows(found[name], box, here).copy_(look([(x + 0.5).floor().long() for x in coordinates]))
                continue
            share = [(x - corner).to(field.dtype) for x, corner in zip(coordinates, corners, strict=True)]
            first = [corner.long() for corner in corners]
            total = torch.zeros((), dtype=field.dtype)
            for ends in itertools.product((0, 1), repeat=len(shape)):
                value = look([i + end for i, end in zip(first, ends, strict=True)])
                for end, weight in zip(ends, share, strict=True):
                    value = value * (weight if end else 1 - weight)
                total = total + value
            _rows(found[name], box, here).copy_(total)
    return found


def _rows(field: Tensor, box: Box, rows: slice) -> Tensor:
    """A view of the rows of a field along its first spatial dim."""
    return field.narrow(field.ndim - len(box), rows.start, rows.stop - rows.start)


class _Lookup:
    """Voxels of a field by their global positions."""

    def __init__(self, field: Tensor, source: Box, shape: Shape, fill: Fill) -> None:
        self._flat = field.reshape(*field.shape[: field.ndim - len(shape)], -1)
        self._source, self._shape = source, shape
        self._fill = None if fill[0] is None else fill[0 if field.is_floating_point() else 1]

    def __call__(self, positions: Sequence[Tensor]) -> Tensor:
        flat, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for position, span, size in zip(positions, self._source, self._shape, strict=True):
            flat = flat * span.size + (position.clamp(0, size - 1) - span.lo)
            inside = inside & (position >= 0) & (position < size)
        values = self._flat[..., flat]
        return (
            values if self._fill is None else torch.where(inside, values, torch.tensor(self._fill, dtype=values.dtype))
        )


def _slabs(box: Box) -> Iterator[Box]:
    """`box` cut along its first dim, so that coordinates and neighbours take little memory."""
    first, *rest = box
    step = max(1, _SLAB // max(1, math.prod(sizes(tuple(rest)))))
    for lo in range(first.lo, first.hi, step):
        yield (Interval(lo, min(first.hi, lo + step)), *rest)
