"""Affine and elastic deformation: a rank reads the box its voxels come from, within a halo that the user states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.data.resample import reached, resample, see_reach
from meshwright.data.transforms import Box, Fields, Shape, sizes
from meshwright.errors import DataError
from meshwright.parallel import noise
from meshwright.plan.geometry import Interval

_UNFOLDED = 0.4  # of the spacing of control points
_SLACK = 1e-6  # voxels; a weighted mean may leave the range of its numbers by rounding


@dataclass(frozen=True)
class Affine:
    """The output at p is the input at `matrix` · (p − centre) + centre + `shift`, p in voxels (D, H, W).

    `centre` None: the middle of the sample. `halo`: the furthest that a voxel may move, in voxels; `DataError` where
    the deformation of what is asked for moves one further. `fill`, `label_fill`, `nearest`: as in
    `resample`.
    """

    matrix: tuple[tuple[float, ...], ...]
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    centre: tuple[float, ...] | None = None
    halo: float = 16.0
    fill: float | None = None
    label_fill: int = 0
    nearest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rank = len(self.shift)
        if len(self.matrix) != rank or any(len(row) != rank for row in self.matrix):
            raise ValueError(f"a matrix of {rank} × {rank} numbers is needed for a shift of {rank}")
        if not all(map(math.isfinite, (*self.shift, *(number for row in self.matrix for number in row)))):
            raise ValueError("matrix and shift must be finite")

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.shift):
            raise DataError(f"an affine map of {len(self.shift)} dims does not fit a sample of {len(shape)}")
        return shape

    def _at(self, positions: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        """Coordinates at positions (fp64, one vector a dim). Each sum is monotone in each position, rounding too."""
        rank, found = len(shape), []
        centre = self.centre or tuple((size - 1) / 2 for size in shape)
        for i, row in enumerate(self.matrix):
            total = torch.full((), centre[i] + self.shift[i], dtype=torch.float64)
            for j, factor in enumerate(row):
                along = (positions[j] - centre[j]) * factor
                total = total + along.view(-1, *(1 for _ in range(rank - 1 - j)))
            found.append(total)
        return found

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        if not math.prod(sizes(box)):
            return (tuple(Interval(0, 0) for _ in box),)
        ends = [torch.tensor([span.lo, span.hi - 1], dtype=torch.float64) for span in box]
        found, moves = [], []
        for i, corners in enumerate(self._at(ends, shape)):
            own = ends[i].view(-1, *(1 for _ in range(len(shape) - 1 - i)))
            moves.append(float((corners - own).abs().max()))
            found.append(reached(float(corners.min()), float(corners.max()), shape[i]))
        see_reach("the affine map", moves, self.halo)
        return (tuple(found),)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        (source,) = self.sources(box, shape)

        def at(slab: Box) -> list[Tensor]:
            return self._at([torch.arange(span.lo, span.hi, dtype=torch.float64) for span in slab], shape)

        return resample(parts[0], source, box, shape, at, (self.fill, self.label_fill), self.nearest)


@dataclass(frozen=True)
class Elastic:
    """The output at p is the input at p + u(p), u a cubic B-spline with random control points.

    The points lie `spacing` voxels apart; each coordinate of each is uniform in ± `amplitude` voxels, a function of
    `key` and the point's number (Rueckert et al., "Nonrigid registration using free-form deformations", 1999). Splines
    stay within their control points, so no voxel moves further than `amplitude`; with `amplitude` ≤ 0.4 · `spacing`
    space does not fold (Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", 2000),
    more is refused with `ValueError`. `halo` and what follows it: as in `Affine`.
    """

    spacing: float
    amplitude: float
    key: int
    halo: float = 16.0
    fill: float | None = None
    label_fill: int = 0
    nearest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.spacing < math.inf or not 0 <= self.amplitude <= _UNFOLDED * self.spacing:
            raise ValueError(
                f"control points {self.spacing:g} voxels apart, moved by up to {self.amplitude:g}: at least 1 apart, "
                f"and moved by at most {_UNFOLDED} of that, so that space does not fold"
            )

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def _reach(self, span: Interval) -> Interval:
        """The control points that positions `span` of a dim depend on, four for each; the first is number 0."""
        first, last = (math.floor(position / self.spacing) for position in (span.lo, span.hi - 1))
        return Interval(first, last + 4)

    def _points(self, along: int, box: Box, shape: Shape) -> Tensor:
        """The displacements along one dim of all control points that `box` depends on."""
        grid = tuple(self._reach(Interval(0, size)).hi for size in shape)
        points = tuple(self._reach(span) for span in box)
        bits = noise.words(noise.mix(noise.mix(self.key) ^ along), grid, points, torch.device("cpu"))
        return (noise.unit(bits) * 2 - 1) * self.amplitude

    def _at(self, box: Box, shape: Shape) -> list[Tensor]:
        rank, found = len(shape), []
        places = [torch.arange(span.lo, span.hi, dtype=torch.float64) for span in box]
        weights = [_weights(place, self.spacing) for place in places]
        for i in range(rank):
            moved = self._points(i, box, shape)
            for j, (first, four) in enumerate(weights):
                first = first - self._reach(box[j]).lo
                column = (-1, *(1 for _ in range(rank - 1 - j)))
                tap = [moved.index_select(j, first + t) * weight.view(column) for t, weight in enumerate(four)]
                moved = tap[0] + tap[1] + tap[2] + tap[3]
            found.append(moved + places[i].view(-1, *(1 for _ in range(rank - 1 - i))))
        return found

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        see_reach("the elastic deformation", [self.amplitude] * len(shape), self.halo)
        if not math.prod(sizes(box)):
            return (tuple(Interval(0, 0) for _ in box),)
        found = []
        for i, span in enumerate(box):
            points = self._points(i, box, shape)
            low, high = float(points.min()) - _SLACK, float(points.max()) + _SLACK
            found.append(reached(span.lo + low, span.hi - 1 + high, shape[i]))
        return (tuple(found),)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        (source,) = self.sources(box, shape)
        return resample(
            parts[0], source, box, shape, lambda slab: self._at(slab, shape), (self.fill, self.label_fill), self.nearest
        )


def _weights(places: Tensor, spacing: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(number of the first of four control points, their weights) at each place: the uniform cubic B-spline."""
    along = places / spacing
    first = along.floor()
    f = along - first
    g, square = 1 - f, f * f
    cube = square * f
    return first.long(), (
        g * g * g / 6,
        (cube * 3 - square * 6 + 4) / 6,
        (square * 3 - cube * 3 + f * 3 + 1) / 6,
        cube / 6,
    )
