"""An array in a file, of which any box can be read: the one interface of all formats.

The last three dims are D, H, W; dims before them are channels. `read` says how many bytes it decoded, so that
bytes read ÷ ideal is a number and not a hope.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from meshwright.errors import DataError

SLAB_BYTES = 8 << 20  # stored numbers that are converted at a time

Array = np.ndarray[Any, np.dtype[Any]]
Spans = tuple[slice, ...]


class Slab(NamedTuple):
    """Stored numbers of one piece of a box: `box[where]`, the bytes decoded to get them, and those taken from the copy
    that one rank of this host has decoded."""

    where: Spans
    values: Array
    read_bytes: int
    shared_bytes: int = 0


class StoredArray(Protocol):
    """Numbers in a file. Opening has read the header only; every error names the file."""

    @property
    def name(self) -> str:
        """The file, and the dataset in it: "scan.h5::image"."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers: whole or floating-point ones."""

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """The smallest box that is decoded as one; None where any run of bytes can be read by itself."""

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """The size of a voxel along D, H, W, where the file knows it."""

    def prepare(self, spans: Sequence[slice]) -> int:
        """See that a stream of which several ranks of this host want boxes is decoded once; the bytes decoded now."""

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        """The box `spans` (one slice a dim) in stored numbers, and the bytes decoded. Raises `DataError`."""

    def slabs(self, spans: Sequence[slice]) -> Iterator[Slab]:
        """The same box in pieces of about `SLAB_BYTES`, so that a conversion needs no second copy of it."""

    def scale(self, raw: Array) -> Array:
        """Stored numbers → float32 values, rounded once."""


class RandomAccess:
    """What formats share in which any box can be read by itself."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    spacing_mm: tuple[float, float, float] | None = None

    def prepare(self, spans: Sequence[slice]) -> int:
        """Nothing to do: what another rank reads would not spare this one anything."""
        return 0

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        raise NotImplementedError

    def slabs(self, spans: Sequence[slice]) -> Iterator[Slab]:
        """Pieces along D that end where chunks end, so that no chunk is decoded twice."""
        for where, box in self.pieces(spans):
            values, read_bytes = self.read(box)
            yield Slab(where, values, read_bytes)

    def pieces(self, spans: Sequence[slice]) -> Iterator[tuple[Spans, Spans]]:
        """Of each slab: where it lies in the box, and its own box."""
        box = checked(self, spans)
        if any(span.start == span.stop for span in box):
            return
        depth, step = box[-3], self.chunks[-3] if self.chunks else 1
        plane_bytes = math.prod(sizes(box)) // (depth.stop - depth.start) * self.dtype.itemsize
        step *= max(1, SLAB_BYTES // max(1, plane_bytes * step))
        lead, behind = len(box) - 3, box[-2:]
        for start in range(depth.start - depth.start % step, depth.stop, step):
            span = slice(max(start, depth.start), min(start + step, depth.stop))
            where = (slice(None),) * lead + (slice(span.start - depth.start, span.stop - depth.start),)
            yield where, (*box[:lead], span, *behind)

    def scale(self, raw: Array) -> Array:
        """Stored numbers → float32 values."""
        return raw.astype(np.float32)


def sizes(spans: Sequence[slice]) -> tuple[int, ...]:
    """The shape of the box `spans`."""
    return tuple(span.stop - span.start for span in spans)


def checked(array: StoredArray | RandomAccess, spans: Sequence[slice]) -> Spans:
    """`spans` as they are, if they are a box of the array. Raises `DataError`."""
    box = tuple(spans)
    if len(box) != len(array.shape) or any(
        not 0 <= span.start <= span.stop <= size or span.step not in (None, 1)
        for span, size in zip(box, array.shape, strict=False)
    ):
        raise DataError(f"{array.name}: the box {box} is no part of shape {array.shape}")
    return box


def box_bytes(array: StoredArray | RandomAccess, spans: Sequence[slice]) -> int:
    """The bytes that no reader could do without."""
    return math.prod(sizes(spans)) * array.dtype.itemsize


def chunk_bytes(array: StoredArray | RandomAccess, spans: Sequence[slice]) -> int:
    """The bytes of the chunks that a box touches, each counted whole: what has to be decoded for it."""
    if any(span.start == span.stop for span in spans):
        return 0
    assert array.chunks is not None
    touched = [-(-span.stop // size) - span.start // size for span, size in zip(spans, array.chunks, strict=True)]
    return math.prod(touched) * math.prod(array.chunks) * array.dtype.itemsize


def spacing_of(attributes: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    """The attribute `spacing_mm` (D, H, W) of an array, if it has one. Raises `DataError` for anything else there, and
    for attributes by which netCDF says that the stored numbers are not the values yet."""
    for scaling, neutral in (("scale_factor", 1), ("add_offset", 0)):
        if scaling in attributes and not np.all(np.equal(attributes[scaling], neutral)):
            raise DataError(
                f"{name}: the attribute {scaling} is {attributes[scaling]!r}; numbers that have to be scaled first are "
                "not read here: write the values themselves, without this attribute"
            )
    raw = attributes.get("spacing_mm")
    if raw is None:
        return None
    try:
        d, h, w = (float(size) for size in raw)
    except (TypeError, ValueError):
        raise DataError(f"{name}: the attribute spacing_mm is {raw!r}; three numbers (D, H, W) are expected") from None
    return d, h, w


def see_numbers(name: str, dtype: np.dtype[Any], shape: Sequence[int], dims: int = 3) -> None:
    """Raise `DataError` unless an array holds numbers in at least `dims` dims."""
    if dtype.kind not in "iufb":
        raise DataError(f"{name}: values of type {dtype}; integers or floating-point numbers are expected")
    if len(shape) < dims:
        least = "the dims D, H, W are" if dims == 3 else f"{dims} dim{'s are' if dims > 1 else ' is'}"
        raise DataError(f"{name}: an array of shape {tuple(shape)}; at least {least} expected")
