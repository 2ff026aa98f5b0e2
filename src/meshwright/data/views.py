"""Arrays that are put together from others: one sample of a stack, or channels that lie in files of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.data.arrays import Array, Slab, StoredArray, checked, sizes
from meshwright.errors import DataError


@dataclass(frozen=True)
class Sample:
    """Number `index` along the first dim of `stack`, without that dim."""

    stack: StoredArray
    index: int

    @property
    def name(self) -> str:
        return f"{self.stack.name}[{self.index}]"

    @property
    def path(self) -> Path:
        return self.stack.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stack.dtype

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return None if self.stack.chunks is None else self.stack.chunks[1:]

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        return self.stack.spacing_mm

    def prepare(self, spans: Sequence[slice]) -> int:
        return self.stack.prepare(self._box(spans))

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        values, read_bytes = self.stack.read(self._box(spans))
        return values[0], read_bytes

    def slabs(self, spans: Sequence[slice]) -> Iterator[Slab]:
        for slab in self.stack.slabs(self._box(spans)):
            yield slab._replace(where=slab.where[1:], values=slab.values[0])

    def scale(self, raw: Array) -> Array:
        return self.stack.scale(raw)

    def _box(self, spans: Sequence[slice]) -> tuple[slice, ...]:
        return (slice(self.index, self.index + 1), *checked(self, spans))


@dataclass(frozen=True)
class Channels:
    """Arrays [D, H, W] of one shape as one array [C, D, H, W]; its stored numbers are values (float32) already."""

    parts: tuple[StoredArray, ...]

    @property
    def name(self) -> str:
        return f"{self.parts[0].name} and {len(self.parts) - 1} more"

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.result_type(*(part.dtype for part in self.parts))

    @property
    def chunks(self) -> tuple[int, ...] | None:
        chunks = self.parts[0].chunks
        return None if chunks is None else (1, *chunks)

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        return self.parts[0].spacing_mm

    def prepare(self, spans: Sequence[slice]) -> int:
        return sum(part.prepare(spans[1:]) for part in self.parts)

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        values, read_bytes = np.empty(sizes(checked(self, spans)), np.float32), 0
        for slab in self.slabs(spans):
            values[slab.where] = slab.values
            read_bytes += slab.read_bytes
        return values, read_bytes

    def slabs(self, spans: Sequence[slice]) -> Iterator[Slab]:
        channels, *box = checked(self, spans)
        for position, part in enumerate(self.parts[channels]):
            for slab in part.slabs(box):
                where = (slice(position, position + 1), *slab.where)
                yield slab._replace(where=where, values=part.scale(slab.values)[None])

    def scale(self, raw: Array) -> Array:
        return raw


def stacked(arrays: Sequence[StoredArray]) -> StoredArray:
    """Several arrays [D, H, W] of one shape as one of channels; a single one as it is. Raises `DataError`."""
    for array in arrays[1:]:
        if array.shape != arrays[0].shape or len(array.shape) != 3:
            raise DataError(
                f"{arrays[0].name} has shape {arrays[0].shape} but {array.name} has {array.shape}; the channels of one "
                "case need one shape (D, H, W)"
            )
    return arrays[0] if len(arrays) == 1 else Channels(tuple(arrays))


def parts_of(array: StoredArray) -> tuple[StoredArray, ...]:
    """The arrays that an array is put together from, or itself."""
    return array.parts if isinstance(array, Channels) else (array,)


def files_of(array: StoredArray) -> tuple[Path, ...]:
    """Every file or folder that an array is read from."""
    return tuple(part.path for part in parts_of(array))
