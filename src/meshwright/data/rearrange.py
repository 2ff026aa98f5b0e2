"""Augmentations that only move voxels: flip, permutation of dims, rotation by 90°, roll, crop. No arithmetic at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.data.transforms import WORDS, Box, Compose, Fields, Shape, Transform, dim, see_dims
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval


def _moved(part: Fields, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: move(field) for name, field in part.items()}


@dataclass(frozen=True)
class Flip:
    """`torch.flip` along the named dims: the output [lo, hi) is the input [n − hi, n − lo), reversed."""

    dims: tuple[str, ...]

    def __post_init__(self) -> None:
        see_dims(self.dims, "flip")

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        found = list(box)
        for word in self.dims:
            at = dim(word, len(shape))
            found[at] = Interval(shape[at] - box[at].hi, shape[at] - box[at].lo)
        return (tuple(found),)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        dims = [dim(word, len(shape)) - len(shape) for word in self.dims]
        return _moved(parts[0], lambda field: torch.flip(field, dims))


@dataclass(frozen=True)
class Permute:
    """Exchange dims: dim i of the output is dim `order[i]` of the input, all spatial dims named.

    Dims that take each other's place must have one global size, so that samples of a batch keep one shape: other
    shapes are refused (`DataError`).
    """

    order: tuple[str, ...]

    def __post_init__(self) -> None:
        see_dims(self.order, "permute")
        if not self.order or set(self.order) != set(WORDS[-len(self.order) :]):
            raise ValueError(f"permute must name each of the last {len(self.order)} dims once: {', '.join(self.order)}")

    def _order(self, shape: Shape) -> list[int]:
        if len(self.order) != len(shape):
            raise DataError(f"permute names {len(self.order)} dims, the sample has {len(shape)}")
        return [dim(word, len(shape)) for word in self.order]

    def output_shape(self, shape: Shape) -> Shape:
        names = WORDS[-len(shape) :]
        for to, origin in enumerate(self._order(shape)):
            if shape[to] != shape[origin]:
                raise DataError(
                    f"{names[origin]} cannot take the place of {names[to]}: the sample is {shape[origin]} and "
                    f"{shape[to]} voxels long there; permute or rotate dims of one size, or crop to one first"
                )
        return shape

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        found = dict(zip(self._order(shape), box, strict=True))
        return (tuple(found[at] for at in range(len(shape))),)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        order = self._order(shape)

        def move(field: Tensor) -> Tensor:
            lead = field.ndim - len(shape)
            return field.permute(*range(lead), *(lead + at for at in order))

        return _moved(parts[0], move)


def rotate90(plane: tuple[str, str], times: int = 1, rank: int = 3) -> Compose:
    """`torch.rot90(x, times, plane)`: from the first dim of `plane` towards the second, `times` quarter turns.

    Volumes of `rank` spatial dims. An odd number of turns needs both dims of one global size (`DataError` later).
    """
    see_dims(plane, "rotate90")
    first, second = plane
    times %= 4
    names = list(WORDS[-rank:])
    if not {first, second} <= set(names):
        raise ValueError(f"rotate90 of {first} and {second}: samples with {rank} spatial dims have {', '.join(names)}")
    if times % 2 == 0:
        return Compose((Flip(plane),) if times else ())
    a, b = names.index(first), names.index(second)
    names[a], names[b] = second, first
    steps: tuple[Transform, ...] = (Flip((second if times == 1 else first,)), Permute(tuple(names)))
    return Compose(steps)


@dataclass(frozen=True)
class Roll:
    """`torch.roll`: what leaves at one end comes in at the other; so an interval is read in up to two pieces a dim."""

    dims: tuple[str, ...]
    shifts: tuple[int, ...]

    def __post_init__(self) -> None:
        see_dims(self.dims, "roll")
        if len(self.dims) != len(self.shifts):
            raise ValueError(f"roll has {len(self.dims)} dims but {len(self.shifts)} shifts")

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def _pieces(self, box: Box, shape: Shape) -> list[tuple[Interval, ...]]:
        found: list[tuple[Interval, ...]] = [(interval,) for interval in box]
        for word, shift in zip(self.dims, self.shifts, strict=True):
            at = dim(word, len(shape))
            lo = (box[at].lo - shift) % shape[at]
            hi = lo + box[at].size
            found[at] = (Interval(lo, min(hi, shape[at])),)
            if hi > shape[at]:
                found[at] += (Interval(0, hi - shape[at]),)
        return found

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        return tuple(itertools.product(*self._pieces(box, shape)))

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        found = [dict(part) for part in parts]
        for at, pieces in reversed(list(enumerate(self._pieces(box, shape)))):
            count, along = len(pieces), at - len(shape)
            found = [_joined(found[i : i + count], along) for i in range(0, len(found), count)]
        return found[0]


def _joined(parts: Sequence[dict[str, Tensor]], along: int) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts], along) for name in parts[0]}


@dataclass(frozen=True)
class Crop:
    """The box of `size` voxels that begins at the global position `start`; outside of the sample: `DataError`."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def output_shape(self, shape: Shape) -> Shape:
        if len(self.start) != len(shape) or len(self.size) != len(shape):
            raise DataError(f"crop {self.size} from {self.start} does not fit a sample with {len(shape)} spatial dims")
        for lo, size, full in zip(self.start, self.size, shape, strict=True):
            if lo < 0 or size < 1 or lo + size > full:
                raise DataError(f"crop of {self.size} voxels from {self.start} leaves the sample of shape {shape}")
        return self.size

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        return (tuple(Interval(lo + span.lo, lo + span.hi) for lo, span in zip(self.start, box, strict=True)),)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        return dict(parts[0])
