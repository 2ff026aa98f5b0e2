"""Where the labels of samples have foreground, for patches around it: found once, by one rank of each host for all.

The label is read whole, a slab at a time, and cut into cells; each cell with labelled voxels comes as the tight box of
these, as `patches.boxes_of` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from meshwright.data import once
from meshwright.data.arrays import SLAB_BYTES, Array
from meshwright.data.measure import Spent
from meshwright.data.source import LABEL_BYTES, ReadStats, VolumeSource
from meshwright.data.views import files_of
from meshwright.data.volumes import Pairs

CELL = 16  # voxels
Boxes = tuple[tuple[slice, ...], ...]


class Foreground:
    """The boxes of the foreground (labels above 0) of the samples of `source`; `spent` hears what reading has cost."""

    def __init__(self, source: VolumeSource, spent: Callable[[ReadStats], None] = lambda stats: None) -> None:
        self._source, self._spent = source, spent
        self._found: dict[int, Boxes] = {}

    def boxes(self, index: int) -> Boxes:
        """Of sample `index`, equal on all ranks. Raises `DataError`."""
        if index not in self._found:
            found = self._on_this_host(index)
            self._found[index] = tuple(tuple(slice(lo, hi) for lo, hi in box) for box in found)
        return self._found[index]

    def known(self, index: int) -> Boxes:
        """What `boxes` has found for sample `index`; nothing, if it was not asked or could not read it."""
        return self._found.get(index, ())

    def forget(self, index: int) -> None:
        """Be as if sample `index` could not be read."""
        self._found.pop(index, None)

    def _on_this_host(self, index: int) -> list[list[list[int]]]:
        label = self._source.pairs[index].label if isinstance(self._source, Pairs) else None
        if label is None or not once.several_ranks():
            return boxes_in(self._slabs(index))

        def make(file: BinaryIO) -> None:
            file.write(json.dumps(boxes_in(self._slabs(index))).encode())

        file = once.once(once.identity(files_of(label), label.name, "foreground", CELL), 0, make)
        if file is None:  # no room for it
            return boxes_in(self._slabs(index))
        with file:
            file.seek(0)
            found: list[list[list[int]]] = json.load(file)
            return found

    def _slabs(self, index: int) -> Iterator[tuple[int, Array]]:
        """(first plane, labels [d, h, w]) of pieces along D, in order."""
        depth, height, width = self._source.shape(index)
        if isinstance(self._source, Pairs):
            label, spent = self._source.pairs[index].label, Spent()
            box = (*(slice(0, 1) for _ in label.shape[:-3]), *(slice(0, size) for size in label.shape[-3:]))
            spent.read_bytes += label.prepare(box)
            for where, values in spent.values(label, box):
                yield where[len(label.shape) - 3].start or 0, values.reshape(-1, height, width)
            self._spent(ReadStats(spent.read_bytes, shared_bytes=spent.shared_bytes))
            return
        step = max(1, SLAB_BYTES // (height * width * LABEL_BYTES))
        for start in range(0, depth, step):
            spans = (slice(start, min(start + step, depth)), slice(0, height), slice(0, width))
            part = self._source.read(index, spans)
            self._spent(ReadStats(part.stats.read_bytes, shared_bytes=part.stats.shared_bytes))
            yield start, part["label"][0].numpy()


def boxes_in(slabs: Iterator[tuple[int, Array]]) -> list[list[list[int]]]:
    """The tight boxes ([lo, hi] of D, H, W) of the foreground of each cell of slabs (first plane, [d, h, w])."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for first, values in slabs:
        mask = values > 0
        for z in _steps(first, first + len(mask)):
            for h in _steps(0, mask.shape[1]):
                for w in _steps(0, mask.shape[2]):
                    own = mask[z.start - first : z.stop - first, h, w]
                    if own.any():
                        cell = (z.start // CELL, h.start // CELL, w.start // CELL)
                        box = _tight(own, (z.start, h.start, w.start))
                        found[cell] = _around(found[cell], box) if cell in found else box
    return [found[cell] for cell in sorted(found)]


def _steps(lo: int, hi: int) -> Iterator[slice]:
    """Pieces of [lo, hi) that end where cells end."""
    for start in range(lo - lo % CELL, hi, CELL):
        yield slice(max(start, lo), min(start + CELL, hi))


def _tight(mask: Array, origin: tuple[int, ...]) -> list[list[int]]:
    at = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != dim))) for dim in range(3)]
    return [[lo + int(places[0]), lo + int(places[-1]) + 1] for lo, places in zip(origin, at, strict=True)]


def _around(first: list[list[int]], second: list[list[int]]) -> list[list[int]]:
    return [[min(a[0], b[0]), max(a[1], b[1])] for a, b in zip(first, second, strict=True)]
