"""Chunks of an HDF5 dataset, decoded outside of the HDF5 library.

The library has one lock for all threads of a process and holds it while it decodes, so with it threads read one behind
the other. Here it is only asked where chunks lie; their bytes are read by position and inflated while other threads
run. That covers what most files are: chunks as they are, gzip, shuffle. For everything else, and for everything unusual
on the way, `None` says that the library has to do it, and to say what is wrong.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.data.arrays import Array, sizes
from meshwright.data.inflate import inflated

DEFLATE = 1  # as H5Zpublic.h numbers its filters
SHUFFLE = 2


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie that a box touches: (position in the grid of chunks, offset, stored bytes)."""

    file: int  # the library's own descriptor: valid while the dataset's file is open
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    filters: tuple[int, ...]  # in the order in which they were applied
    found: tuple[tuple[tuple[int, ...], int, int], ...]

    def read(self, box: Sequence[slice]) -> Array | None:
        """The box in stored numbers; None if a chunk is not what it should be. Raises `OSError`."""
        values = np.empty(sizes(box), self.dtype)
        for place, offset, size in self.found:
            whole = self._decoded(os.pread(self.file, size, offset), size)
            if whole is None:
                return None
            begins = [number * edge for number, edge in zip(place, self.chunk, strict=True)]
            spans = [
                (max(span.start, begin), min(span.stop, begin + edge))
                for span, begin, edge in zip(box, begins, self.chunk, strict=True)
            ]
            here = tuple(slice(lo - span.start, hi - span.start) for (lo, hi), span in zip(spans, box, strict=True))
            there = tuple(slice(lo - begin, hi - begin) for (lo, hi), begin in zip(spans, begins, strict=True))
            values[here] = whole[there]
        return values

    def _decoded(self, data: bytes, size: int) -> Array | None:
        if len(data) != size:
            return None
        nbytes = math.prod(self.chunk) * self.dtype.itemsize
        if DEFLATE in self.filters:
            try:
                data = inflated(data, nbytes)
            except zlib.error:
                return None
        if len(data) != nbytes:
            return None
        if SHUFFLE in self.filters:  # the first bytes of all numbers, then the second ones …
            columns = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1)
            rows = np.empty(columns.shape[::-1], np.uint8)
            for at, column in enumerate(columns):
                rows[:, at] = column
            return rows.reshape(-1).view(self.dtype).reshape(self.chunk)
        return np.frombuffer(data, self.dtype).reshape(self.chunk)


def located(item: Any, box: Sequence[slice]) -> Chunks | None:
    """Where the chunks of an open dataset lie that `box` touches; None if the library has to read them."""
    import h5py

    if item.chunks is None or item.is_virtual or item.file.driver != "sec2" or item.file.userblock_size:
        return None
    if h5py.h5t.py_create(item.dtype, logical=True) != item.id.get_type():
        return None  # numbers that do not use all of their bits, and what numpy calls by another name
    made = item.id.get_create_plist()
    steps = [made.get_filter(number) for number in range(made.get_nfilters())]
    filters = tuple(int(step[0]) for step in steps)
    if filters not in ((), (SHUFFLE,), (DEFLATE,), (SHUFFLE, DEFLATE)):
        return None
    if SHUFFLE in filters and steps[0][2][:1] != (item.dtype.itemsize,):
        return None
    places = itertools.product(
        *(range(span.start // edge, -(-span.stop // edge)) for span, edge in zip(box, item.chunks, strict=True))
    )
    found = []
    for place in places if all(sizes(box)) else ():
        at = item.id.get_chunk_info_by_coord(tuple(n * edge for n, edge in zip(place, item.chunks, strict=True)))
        if not at.byte_offset or at.filter_mask:  # not written: fill values; or not through all of the filters
            return None
        found.append((place, int(at.byte_offset), int(at.size)))
    return Chunks(int(item.file.id.get_vfd_handle()), tuple(item.chunks), item.dtype, filters, tuple(found))
