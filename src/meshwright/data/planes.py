"""Read one box of a NIfTI file: what a rank owns, and nothing it would have to throw away later.

A plane of constant z is one run of bytes, and planes are read one by one: a plain file by seeking to the rows that are
needed, a compressed one as a stream that is decoded up to the last of these rows and kept only inside the box.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

import numpy as np

from meshwright.data.nifti import Array, Volume, truncated
from meshwright.errors import DataError

_SKIP_BYTES = 1 << 16  # decoded and dropped at a time


class Planes:
    """Iterate over the planes of a box of a volume, in stored numbers, each [h, w]; `decoded_bytes` counts as it goes.

    `spans` are three slices (D, H, W) inside the shape; an empty box has no planes and reads nothing. At most one
    plane of the box, over the whole width, is in memory. Raises `DataError` for a box outside of the volume and for
    data that ends early.
    """

    def __init__(self, volume: Volume, spans: Sequence[slice]) -> None:
        self.volume = volume
        self.spans = tuple(spans)
        self.decoded_bytes = 0
        if len(self.spans) != 3 or any(
            not 0 <= span.start <= span.stop <= size or span.step not in (None, 1)
            for span, size in zip(self.spans, volume.shape, strict=False)
        ):
            raise DataError(f"{volume.path}: the box {self.spans} is no part of shape {volume.shape} (D, H, W)")

    @property
    def shape(self) -> tuple[int, int, int]:
        d, h, w = (span.stop - span.start for span in self.spans)
        return d, h, w

    @property
    def box_bytes(self) -> int:
        """The bytes that no reader could do without."""
        return math.prod(self.shape) * self.volume.dtype.itemsize

    def __iter__(self) -> Iterator[Array]:
        if 0 in self.shape:
            return
        depth, height, width = self.spans
        _, plane_rows, row = self.volume.shape
        row_bytes = row * self.volume.dtype.itemsize
        with _stream(self.volume) as stream:
            position = 0
            for z in range(depth.start, depth.stop):
                start = self.volume.offset_bytes + (z * plane_rows + height.start) * row_bytes
                if self.volume.compressed:
                    self._take(stream, start - position, keep=False)
                else:
                    stream.seek(start)
                data = self._take(stream, (height.stop - height.start) * row_bytes)
                position = start + len(data)
                yield np.frombuffer(data, self.volume.dtype).reshape(-1, row)[:, width]

    def _take(self, stream: BinaryIO, size: int, *, keep: bool = True) -> bytes:
        """Decode the next `size` bytes; return them if they are to be kept."""
        left, data = size, b""
        while left:
            try:
                data = stream.read(left if keep else min(left, _SKIP_BYTES))
            except (EOFError, zlib.error, gzip.BadGzipFile):
                data = b""
            self.decoded_bytes += len(data)
            left -= len(data)
            if not data or (keep and left):
                raise truncated(self.volume, stream.tell())
        return data


def _stream(volume: Volume) -> BinaryIO:
    return cast(BinaryIO, gzip.open(volume.path)) if volume.compressed else volume.path.open("rb")


def read_box(volume: Volume, spans: Sequence[slice]) -> tuple[Array, int]:
    """The values of a box as float32 [d, h, w], and the bytes decoded for it. Raises as `Planes` does."""
    planes = Planes(volume, spans)
    box = np.empty(planes.shape, np.float32)
    for index, plane in enumerate(planes):
        box[index] = volume.scale(plane)
    return box, planes.decoded_bytes
