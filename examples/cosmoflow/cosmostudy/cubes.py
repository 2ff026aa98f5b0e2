"""Cubes cut from universes, as the library reads volumes: any box of any cube, and of the files no more than that."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import universes
from meshwright.data.arrays import StoredArray
from meshwright.data.formats import open_array
from meshwright.data.source import Field, Part, ReadStats, kept
from meshwright.errors import DataError

BLOCK = 32  # voxels along the edge of a box that is read and kept as one; more where the chunks of the files are longer

Array = np.ndarray[Any, np.dtype[np.int16]]
Where = tuple[int, tuple[int, ...]]  # universe, number of the block along D, H, W


class Cubes:
    """A `VolumeSource` whose samples are the cubes of `size`³ voxels that universes fall into.

    Sample i is cube i % n of universe `first` + i // n, where a universe has n cubes, the last dim fastest. Fields:
    "image" [C, D, H, W] int16, the counts as they are stored, and "target" [4] float32, the parameters of the universe,
    −1 … 1 over the ranges they were drawn from.

    What is read stays in memory, in blocks that end where chunks do, so nothing is decoded twice and no block is read
    of which this rank needs nothing. Raises `DataError` for a folder without these universes, and for a file that holds
    another universe than its name says.
    """

    def __init__(self, folder: str | Path, size: int, first: int, count: int) -> None:
        self._settings, self._folder = universes.load(Path(folder)), Path(folder)
        self.size, self._first, self.universes = size, first, count
        channels, *volume = self._settings.shape
        if any(edge % size for edge in volume):
            raise DataError(f"{folder}: universes of {volume[0]}³ voxels do not fall into cubes of {size}³")
        if self._settings.count < first + count:
            raise DataError(f"{folder} is to hold {self._settings.count} universes; {first + count} are needed")
        self._cells = volume[0] // size
        self.fields = {
            "image": Field("CDHW", (channels,), torch.int16),
            "target": Field("K", (4,), torch.float32),
        }
        ends = vars(self._settings.ranges).values()
        low, high = (np.array([end[at] for end in ends], np.float64) for at in (0, 1))
        self._parameters = physical = np.array([self._settings.parameters(first + i).array() for i in range(count)])
        spread = np.where(high > low, high - low, 1.0)
        self.targets = torch.from_numpy((2 * (physical - low) / spread - 1).astype(np.float32))  # [universes, 4]
        self._edge = max(BLOCK, self._settings.chunk)
        self._blocks: dict[Where, Array] = {}
        self._arrays: dict[int, StoredArray] = {}  # headers are read once
        self._lock = threading.Lock()
        self.stats = ReadStats()

    @property
    def per_universe(self) -> int:
        """Cubes of one universe."""
        return self._cells**3

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(
            f"universe {self._first + universe}, cube {cube}"
            for universe in range(self.universes)
            for cube in range(self.per_universe)
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return self.universes * self.per_universe

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.size, self.size, self.size

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """Of a voxel; universes have none in mm: one in each direction."""
        return 1.0, 1.0, 1.0

    def place(self, index: int) -> tuple[int, tuple[int, int, int]]:
        """The universe of a sample (from 0), and where its cube begins along D, H, W."""
        universe, cube = divmod(index, self.per_universe)
        d, h, w = np.unravel_index(cube, (self._cells,) * 3)
        return universe, (int(d) * self.size, int(h) * self.size, int(w) * self.size)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` (slices of D, H, W of the cube) of sample `index`. Raises `DataError`."""
        before = self.stats.read_bytes
        image = torch.from_numpy(np.ascontiguousarray(self.counts(index, spans)))
        read_bytes = self.stats.read_bytes - before
        fields = {"image": image, "target": self.targets[index // self.per_universe]}
        return kept(fields, read_bytes=read_bytes, ideal_read_bytes=read_bytes and image.nbytes, transient_bytes=0)

    def counts(self, index: int, spans: Sequence[slice]) -> Array:
        """The same box as numbers [C, d, h, w], not to be written: a view of what is kept, where it is one block."""
        universe, start = self.place(index)
        box = [slice(lo + span.start, lo + span.stop) for lo, span in zip(start, spans, strict=True)]
        touched = [range(span.start // self._edge, -(-span.stop // self._edge)) for span in box]
        channels = self._settings.shape[0]
        if all(len(found) == 1 for found in touched):
            return self._block((universe, tuple(found[0] for found in touched)))[(slice(None), *self._inside(box))]
        whole = np.empty((channels, *(span.stop - span.start for span in box)), np.int16)
        for where in itertools.product(*touched):
            cut = [
                slice(max(span.start, at * self._edge), min(span.stop, (at + 1) * self._edge))
                for span, at in zip(box, where, strict=True)
            ]
            to = tuple(slice(c.start - span.start, c.stop - span.start) for c, span in zip(cut, box, strict=True))
            whole[(slice(None), *to)] = self._block((universe, where))[(slice(None), *self._inside(cut))]
        return whole

    def _inside(self, box: Sequence[slice]) -> tuple[slice, ...]:
        """A box within one block, counted from where the block begins."""
        starts = [span.start // self._edge * self._edge for span in box]
        return tuple(slice(span.start - lo, span.stop - lo) for span, lo in zip(box, starts, strict=True))

    def _block(self, where: Where) -> Array:
        with self._lock:
            if where not in self._blocks:
                universe, at = where
                if universe not in self._arrays:
                    self._arrays[universe] = self._opened(universe)
                array = self._arrays[universe]
                channels, *volume = array.shape
                ends = [
                    slice(number * self._edge, min((number + 1) * self._edge, edge))
                    for number, edge in zip(at, volume, strict=True)
                ]
                values, read_bytes = array.read([slice(0, channels), *ends])
                self._blocks[where] = values.astype(np.int16, copy=False)
                self.stats += ReadStats(read_bytes, values.nbytes, values.nbytes, values.nbytes, values.nbytes)
            return self._blocks[where]

    def _opened(self, universe: int) -> StoredArray:
        """The counts of a universe, whose parameters are those that its number gives: a renamed file is found out."""
        number = self._first + universe
        path = self._settings.path(self._folder, number)
        stored, wanted = open_array(f"{path}::parameters", dims=1).read([slice(0, 4)])[0], self._parameters[universe]
        if not np.allclose(stored, wanted, rtol=1e-12, atol=0.0):
            raise DataError(
                f"{path} holds a universe of parameters {stored.tolist()}; universe {number} of "
                f"{self._folder / universes.SETTINGS} has {wanted.tolist()}. Was the file renamed? Generate it anew"
            )
        return open_array(self._settings.image(self._folder, number))
