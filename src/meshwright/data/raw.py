"""Numbers that lie in a file one behind the other: `.npy`, contiguous HDF5, plain NIfTI, a decoded copy.

A box is a set of runs of bytes, and exactly these are read (`pread`): not a memory map, in which a file that shrinks or
a disk that fails ends the process with a signal instead of an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from meshwright.data.arrays import Array, RandomAccess, checked, sizes
from meshwright.data.retry import retried
from meshwright.errors import DataError

# by one call: from a cold cache twice as fast as 4 MiB, because the system goes on reading ahead while bytes are copied
PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class RawArray(RandomAccess):
    """`shape` numbers from `offset_bytes` on; `fortran`: the first dim is the fastest instead of the last."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset_bytes: int
    fortran: bool = False
    label: str = ""  # what errors call it, if not the path
    handle: BinaryIO | None = field(default=None, compare=False, repr=False)  # open already: the path may be gone
    spacing_mm: tuple[float, float, float] | None = None
    shared: bool = False
    chunks: None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label or str(self.path)

    def see_complete(self) -> None:
        """Raise `DataError` if the file is shorter than its header says."""
        self._see_length(retried(lambda: os.stat(self.path).st_size, self.name))

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        """The box in stored numbers; the bytes are those of the box, never more. Raises `DataError`."""
        box = checked(self, spans)
        if not self.fortran:
            return self._read(self.shape, box)
        values, read_bytes = self._read(self.shape[::-1], box[::-1])
        return values.transpose(), read_bytes

    def read_to(self, spans: Sequence[slice], target: Array) -> int:
        """`read` into `target`, contiguous and of the stored type; not of arrays whose first dim is the fastest."""
        assert not self.fortran
        assert target.flags.c_contiguous
        assert (target.dtype, target.shape) == (self.dtype, sizes(spans))
        self._take(target, self.shape, checked(self, spans))
        return target.nbytes

    def _read(self, shape: Sequence[int], box: Sequence[slice]) -> tuple[Array, int]:
        values = np.empty(sizes(box), self.dtype)
        self._take(values, shape, box)
        return values, values.nbytes

    def _take(self, values: Array, shape: Sequence[int], box: Sequence[slice]) -> None:
        if values.size:
            retried(lambda: self._fill(memoryview(values.reshape(-1).view(np.uint8).data), shape, box), self.name)

    def _fill(self, target: memoryview, shape: Sequence[int], box: Sequence[slice]) -> None:
        offsets, run_bytes = runs(shape, box, self.dtype.itemsize)
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if self.handle is None else self.handle.fileno()
        try:
            for index, offset in enumerate(offsets):
                piece = target[index * run_bytes : (index + 1) * run_bytes]
                at = self.offset_bytes + offset
                while piece:
                    count = os.preadv(file, [piece[:PIECE_BYTES]], at)
                    if not count:
                        self._see_length(os.fstat(file).st_size)
                        raise DataError(f"{self.name}: the file became shorter while it was read")
                    piece, at = piece[count:], at + count
        finally:
            if self.handle is None:
                os.close(file)

    def _see_length(self, found: int) -> None:
        expected = self.offset_bytes + math.prod(self.shape) * self.dtype.itemsize
        if found < expected:
            raise DataError(
                f"{self.name}: truncated or damaged: {expected} bytes expected, {found} found. Fetch the file again."
            )


def runs(shape: Sequence[int], box: Sequence[slice], itemsize: int) -> tuple[Iterator[int], int]:
    """(where each run of a box begins, in bytes, and how long all of them are). The last dim is the fastest."""
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    first = len(shape) - 1  # the dims from here on lie in one run
    while first > 0 and box[first].stop - box[first].start == shape[first]:
        first -= 1
    run_bytes = math.prod(sizes(box[first:])) * itemsize
    start = sum(span.start * stride for span, stride in zip(box, strides, strict=True))
    offsets = np.array([start], np.int64)
    for span, stride in zip(box[:first], strides[:first], strict=True):
        offsets = (offsets[:, None] + np.arange(span.stop - span.start, dtype=np.int64) * stride).reshape(-1)
    return iter(offsets.tolist()), run_bytes
