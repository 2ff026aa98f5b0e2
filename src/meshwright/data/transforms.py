"""Augmentation of split samples by reading other voxels: exact, and without communication between ranks.

A transform is two pure functions. *Geometry*: which boxes of the input a box of the output is made from. *Arithmetic*:
the output box from these input boxes and its own global place. A rank asks the geometry for its part of the augmented
sample, reads these boxes of the file, and applies the arithmetic. If the arithmetic of a voxel depends on nothing but
what it reads and its global position, then for every box

    read(transform, reader, box, shape) == read(transform, reader, everything, shape)[box]    bit for bit.

A sample is a mapping of *fields*: images [c, d, h, w] (floating point) and labels [d, h, w] (whole numbers), of which
the last dims are spatial and what is before them is never cut; and others, such as vectors, which pass unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from meshwright.errors import DataError
from meshwright.plan.geometry import Interval

Shape = tuple[int, ...]
Box = tuple[Interval, ...]  # one interval for each spatial dim
Fields = Mapping[str, Tensor]
Reader = Callable[[tuple[slice, ...]], Fields]  # reads a box (slices of D, H, W) of every field

WORDS = ("depth", "height", "width")
VOLUMES = ("image", "label")  # what is spatial by its name


class Transform(Protocol):
    """One augmentation with its numbers already drawn: a value, equal on all ranks."""

    def output_shape(self, shape: Shape) -> Shape:
        """Global spatial shape of the result for an input of global `shape`. Raises `DataError` if it cannot be."""

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        """The boxes of the input (of global `shape`) that `box` of the output is made from, in a fixed order."""

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        """`box` of the output from what was read of `sources(box, shape)` (spatial fields). Leaves `parts` alone."""


def dim(word: str, rank: int) -> int:
    """Position of depth, height or width among `rank` spatial dims, counted from the last one as plans do."""
    if word not in WORDS:
        raise ValueError(f"{word!r} is no dim; choose from {', '.join(WORDS)}")
    number = rank - len(WORDS) + WORDS.index(word)
    if number < 0:
        raise DataError(f"{word} is no dim of samples with {rank} spatial dims")
    return number


def see_dims(words: Sequence[str], what: str) -> None:
    """Raise `ValueError` for a word that names no dim, and for one that comes twice."""
    for word in words:
        dim(word, len(WORDS))
    if len(set(words)) < len(words):
        raise ValueError(f"{what} names a dim twice: {', '.join(words)}")


def sizes(box: Box) -> Shape:
    return tuple(interval.size for interval in box)


def whole(shape: Shape) -> Box:
    return tuple(Interval(0, size) for size in shape)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(interval.lo, interval.hi) for interval in box)


@dataclass(frozen=True)
class Compose:
    """The transforms one after the other, the first one nearest to the file. None at all: the sample as it is.

    What the last one needs is asked of the one before, so nothing is computed or read beyond it: a crop after a
    deformation deforms only what it keeps, with the true surroundings.
    """

    transforms: tuple[Transform, ...] = ()

    def output_shape(self, shape: Shape) -> Shape:
        for transform in self.transforms:
            shape = transform.output_shape(shape)
        return shape

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        if not self.transforms:
            return (box,)
        before, last = Compose(self.transforms[:-1]), self.transforms[-1]
        boxes = last.sources(box, before.output_shape(shape))
        return tuple(source for inner in boxes for source in before.sources(inner, shape))

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        if not self.transforms:
            return dict(parts[0])
        before, last = Compose(self.transforms[:-1]), self.transforms[-1]
        between, built, at = before.output_shape(shape), list[Fields](), 0
        for inner in last.sources(box, between):
            count = len(before.sources(inner, shape))
            built.append(before.build(parts[at : at + count], inner, shape))
            at += count
        return last.build(built, box, between)


def source_spans(transform: Transform, spans: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[slice, ...], ...]:
    """The boxes of the file that a rank reads for `spans` (as `mw.interval` gives them) of the augmented sample.

    `shape` is the global spatial shape of the sample in the file. Raises `DataError`, on all ranks alike, when the
    transform cannot be applied to this shape or reaches further than it may.
    """
    before = tuple(shape)
    after = transform.output_shape(before)
    transform.sources(whole(after), before)  # refuses what any rank would have to refuse
    return tuple(slices(source) for source in transform.sources(_box(spans, after), before))


def read(
    transform: Transform,
    reader: Reader,
    spans: Sequence[slice],
    shape: Sequence[int],
    volumes: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The part `spans` of the augmented sample; `reader` is asked for boxes of the sample of global `shape`.

    `volumes` names the spatial fields; None: as `volumes_of` finds them. Raises as `source_spans` does, and what the
    reader raises.
    """
    return build(transform, [reader(box) for box in source_spans(transform, spans, shape)], spans, shape, volumes)


def build(
    transform: Transform,
    parts: Sequence[Fields],
    spans: Sequence[slice],
    shape: Sequence[int],
    volumes: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """`read` for a caller who has fetched the boxes of `source_spans` already, in that order."""
    if volumes is None:
        volumes = volumes_of(parts[0], len(shape))
    cut = [{name: field for name, field in part.items() if name in volumes} for part in parts]
    built = transform.build(cut, _box(spans, transform.output_shape(tuple(shape))), tuple(shape))
    return {name: built.get(name, field) for name, field in parts[0].items()}


def volumes_of(part: Fields, dims: int) -> tuple[str, ...]:
    """The spatial fields of a sample with so many spatial dims: image and label. What has fewer dims is none.

    Raises `DataError` for any other field: a matrix may have as many dims as a volume, and is never to be cut.
    """
    for name, field in part.items():
        if field.ndim >= dims and name not in VOLUMES:
            raise DataError(
                f"the field {name!r} has {field.ndim} dims, the volume {dims}: say volumes=(…), the names of all "
                "fields that are cut with it"
            )
    return tuple(name for name in VOLUMES if name in part)


def _box(spans: Sequence[slice], shape: Shape) -> Box:
    if len(spans) != len(shape) or any(
        not 0 <= span.start <= span.stop <= size or span.step not in (None, 1)
        for span, size in zip(spans, shape, strict=False)
    ):
        raise DataError(f"{tuple(spans)} is no part of an augmented sample of shape {shape}")
    return tuple(Interval(span.start, span.stop) for span in spans)
