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

_SLAB = 1 << 15  # voxels resampled at once

Coordinates = Callable[[Box], list[Tensor]]  # output box -> global input coordinate along each dim, fp64
Place = tuple[Tensor, Tensor | None]  # steps through a flattened box; whether inside of the volume
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
    edge = fill[0] is None
    for slab in _slabs(box):
        here = slice(slab[0].lo - box[0].lo, slab[0].hi - box[0].lo)
        coordinates = torch.broadcast_tensors(*at(slab))
        if edge:
            coordinates = tuple(x.clamp(0, size - 1) for x, size in zip(coordinates, shape, strict=True))
        corners = [x.floor() for x in coordinates]
        first = [corner.long() for corner in corners]
        lower, upper = (_along([i + end for i in first], source, shape, edge) for end in (0, 1))
        pairs = list(zip(lower, upper, strict=True))
        middle = _along([(x + 0.5).floor().long() for x in coordinates], source, shape, edge)
        for name, field in part.items():
            flat = field.reshape(*field.shape[: field.ndim - len(shape)], -1)
            if name in nearest or not field.is_floating_point():
                outside = fill[0] if field.is_floating_point() else fill[1]
                _rows(found[name], box, here).copy_(_taken(flat, middle, outside))
                continue
            total = torch.zeros((), dtype=field.dtype)
            share = [(x - corner).to(field.dtype) for x, corner in zip(coordinates, corners, strict=True)]
            shares = [(1 - x, x) for x in share]
            for ends in itertools.product((0, 1), repeat=len(shape)):
                weight = math.prod([pair[end] for pair, end in zip(shares, ends, strict=True)], start=1)
                places = [pair[end] for pair, end in zip(pairs, ends, strict=True)]
                total = total + _taken(flat, places, fill[0]) * weight
            _rows(found[name], box, here).copy_(total)
    return found


def _along(positions: Sequence[Tensor], source: Box, shape: Shape, edge: bool) -> list[Place]:
    """Global positions along each dim as steps through the flattened `source`; without `edge`, what is inside too."""
    found, step = list[Place](), 1
    for position, span, size in reversed(list(zip(positions, source, shape, strict=True))):
        held = position if edge else position.clamp(0, size - 1)
        inside = None if edge else held == position
        found.append(((held.clamp(max=size - 1) - span.lo) * step, inside))
        step *= span.size
    return found[::-1]


def _taken(flat: Tensor, places: Sequence[Place], outside: float | None) -> Tensor:
    """The voxels at `places` (one for each dim) of a field [..., voxels]."""
    offset = places[0][0]
    for more, _ in places[1:]:
        offset = offset + more
    values = flat[..., offset]
    for _, inside in places:
        if inside is not None and outside is not None:
            values = torch.where(inside, values, torch.tensor(outside, dtype=values.dtype))
    return values


def _rows(field: Tensor, box: Box, rows: slice) -> Tensor:
    """A view of the rows of a field along its first spatial dim."""
    return field.narrow(field.ndim - len(box), rows.start, rows.stop - rows.start)


def _slabs(box: Box) -> Iterator[Box]:
    """`box` cut along its first dim, so that coordinates and neighbours take little memory."""
    first, *rest = box
    step = max(1, _SLAB // max(1, math.prod(sizes(tuple(rest)))))
    for lo in range(first.lo, first.hi, step):
        yield (Interval(lo, min(first.hi, lo + step)), *rest)
