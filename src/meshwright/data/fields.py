"""Samples of any named fields from files: images of several kinds, labels, vectors, each in a type of its own.

    source = open_fields("simulations", {"image": "CDHW", "parameters": "K"})
    part = read_batch(source, [0, 1], spans)  # part["image"] [2, c, d, h, w], part["parameters"] [2, k], both float32

A `VolumeSource` like any other: a rank reads its box of what has D, H and W, and the whole of what has not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from meshwright.data.arrays import Array, StoredArray, box_bytes
from meshwright.data.field_files import Found, find_samples
from meshwright.data.grid import see_one_grid
from meshwright.data.hdf5_mpi import through_mpi
from meshwright.data.source import Field, Part, kept
from meshwright.errors import DataError

_DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SPACE = "DHW"


@dataclass(frozen=True)
class Stored:
    """How a field lies in files, and what becomes of it: stored number · `scale` + `shift`, rounded once to `dtype`.

    `layout` has one letter for each dim on disk: "DHW" at its end for what is cut with the volume, any others, such as
    C or K, for what is not; "" for one number. `names` are the datasets, or the words in file names; none: the field's
    own name. Several of layout "DHW" become the channels of one field "CDHW", in this order.

    Raises `ValueError`.
    """

    layout: str
    names: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(set(self.layout)) < len(self.layout) or (
            set(self.layout) & set(_SPACE) and not self.layout.endswith(_SPACE)
        ):
            raise ValueError(f"layout {self.layout!r}: each letter once, and D, H, W together at the end or not at all")
        if len(self.names) > 1 and self.layout != _SPACE:
            raise ValueError(f"{', '.join(self.names)} become channels, so their layout is 'DHW', not {self.layout!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.dtype}: choose from {', '.join(map(str, _DTYPES))}")
        whole = not self.dtype.is_floating_point
        if not (math.isfinite(self.scale) and math.isfinite(self.shift)) or (
            whole and (self.scale, self.shift) != (1, 0)
        ):
            raise ValueError(f"scale {self.scale}, shift {self.shift}: finite numbers, and none for whole {self.dtype}")

    def converted(self, array: StoredArray, raw: Array) -> Array:
        """Stored numbers as values of `dtype`. Raises `DataError` for NaN, infinities and what `dtype` cannot hold."""
        values = raw if array.scale(np.array([0, 1], array.dtype)).tolist() == [0, 1] else array.scale(raw)
        into = np.dtype(str(self.dtype).removeprefix("torch."))
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DataError(f"{array.name}: contains NaN or infinity; replace these numbers before training")
        if (self.scale, self.shift) != (1, 0):
            values = values.astype(np.float64) * self.scale + self.shift
        elif into.kind in "iu" and values.size:
            low, high, ends = values.min(), values.max(), np.iinfo(into)
            broken = values.dtype.kind == "f" and bool((values != np.floor(values)).any())
            if broken or low < ends.min or high > ends.max:
                raise DataError(
                    f"{array.name}: values from {low} to {high}; whole numbers from {ends.min} to {ends.max} are "
                    f"expected for {self.dtype}"
                )
        return values.astype(into, copy=False)


@dataclass(frozen=True)
class FieldSource:
    """A `VolumeSource` of samples that `open_fields` has found; `classes` names the values of the field "label"."""

    samples: tuple[Found, ...]
    stored: Mapping[str, Stored]
    fields: Mapping[str, Field]
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sample.name for sample in self.samples)

    def shape(self, index: int) -> tuple[int, int, int]:
        d, h, w = self.samples[index].arrays["image"][0].shape[-3:]
        return d, h, w

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self.samples[index].arrays["image"][0].spacing_mm or (1.0, 1.0, 1.0)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` of sample `index`: every field as [1, …], in its own type. Raises `DataError`."""
        boxes = [
            (name, number, array, _box(self.stored[name], array, spans))
            for name, arrays in self.samples[index].arrays.items()
            for number, array in enumerate(arrays)
        ]
        read_bytes = sum(array.prepare(box) for _, _, array, box in boxes)
        edges, shared, transient, ideal = [span.stop - span.start for span in spans], 0, 0, 0
        fields = {name: torch.empty(field.shape(edges), dtype=field.dtype) for name, field in self.fields.items()}
        for name, number, array, box in boxes:
            stored, target = self.stored[name], fields[name].numpy()
            target = target[number] if target.ndim > len(stored.layout) else target
            ideal += box_bytes(array, box)
            if not self.fields[name].is_volume:
                raw, spent = array.read(box)
                target[...], read_bytes = stored.converted(array, raw), read_bytes + spent
                continue
            for slab in array.slabs(box):
                target[slab.where] = stored.converted(array, slab.values)
                read_bytes, shared = read_bytes + slab.read_bytes, shared + slab.shared_bytes
                transient = max(transient, slab.values.nbytes + 16 * slab.values.size)  # and fp64 while it is scaled
        self._see_classes(index, fields)
        return kept(
            fields, read_bytes=read_bytes, ideal_read_bytes=ideal, transient_bytes=transient, shared_bytes=shared
        )

    def _see_classes(self, index: int, fields: Mapping[str, torch.Tensor]) -> None:
        label = fields.get("label")
        if (
            self.classes
            and label is not None
            and label.numel()
            and not 0 <= label.min() <= label.max() < len(self.classes)
        ):
            wrong = label[(label < 0) | (label >= len(self.classes))][0]
            raise DataError(
                f"{self.samples[index].arrays['label'][0].name}: label value {wrong}; whole numbers from 0 to "
                f"{len(self.classes) - 1} are expected for the {len(self.classes)} classes {', '.join(self.classes)}"
            )


def open_fields(
    path: str | Path,
    layouts: Mapping[str, str | Stored],
    classes: Sequence[str] = (),
    bad: list[str] | None = None,
    hdf5_driver: Literal["independent", "mpio"] = "independent",
) -> FieldSource:
    """The samples in a folder, an HDF5 file or a Zarr group, in order of their names; only headers are read.

    `layouts` says for each field how it lies in the files: its layout, or a `Stored`. There is a volume "image" among
    them (layout "DHW" is one channel). By default "label" becomes uint8 and every other field float32. Where samples
    lie: `field_files`. An array with one dim more than its layout is a stack of samples along the first.

    `hdf5_driver` "mpio": HDF5 is read through MPI-IO, where h5py is built with MPI.

    Raises `DataError` for files that are missing, damaged or do not fit together, by name; with a list `bad` such
    samples are left out, and the reasons added to it. Raises `ValueError` for layouts that make no sense.
    """
    stored = {
        name: how if isinstance(how, Stored) else Stored(how, dtype=torch.uint8 if name == "label" else torch.float32)
        for name, how in layouts.items()
    }
    if "image" not in stored or stored["image"].layout not in ("DHW", "CDHW"):
        raise ValueError("layouts: a field 'image' of layout 'CDHW' or 'DHW' is needed")
    words = {name: how.names or (name,) for name, how in stored.items()}
    every = list(chain(*words.values()))
    if len(set(every)) < len(every):
        raise ValueError(f"layouts: the names {', '.join(every)} are not all different")
    dims = {word: len(stored[name].layout) for name, own in words.items() for word in own}
    fields: dict[str, Field] = {}
    samples = tuple(_that_fit(find_samples(Path(path), words, dims, bad), stored, fields, bad))
    if not samples:
        raise DataError(f"{path}: no sample can be used; {'; '.join(bad or [])}")
    if hdf5_driver == "mpio":
        samples = tuple(
            Found(sample.name, {name: tuple(map(through_mpi, own)) for name, own in sample.arrays.items()})
            for sample in samples
        )
    return FieldSource(samples, stored, fields, tuple(classes))


def _that_fit(
    samples: Sequence[Found], stored: Mapping[str, Stored], fields: dict[str, Field], bad: list[str] | None
) -> Iterator[Found]:
    """The samples whose volumes lie on one grid, and whose other sizes are those of the first, which fill `fields`."""
    first: Found | None = None
    for sample in samples:
        try:
            see_one_grid([a for name, own in sample.arrays.items() if "D" in stored[name].layout for a in own])
            found = {name: _field(name, stored[name], own) for name, own in sample.arrays.items()}
            for name, field in found.items():
                if first is not None and field != fields[name]:
                    before, now = first.arrays[name][0], sample.arrays[name][0]
                    raise DataError(
                        f"{before.name} has shape {before.shape} but {now.name} has {now.shape} "
                        f"({stored[name].layout}): all samples need one size of {name}, but for D, H and W"
                    )
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        if first is None:
            first = sample
            fields.update(found)
        yield sample


def _field(name: str, stored: Stored, arrays: Sequence[StoredArray]) -> Field:
    if stored.layout == _SPACE and (len(arrays) > 1 or name == "image"):
        return Field("CDHW", (len(arrays),), stored.dtype)
    sizes = tuple(size for letter, size in zip(stored.layout, arrays[0].shape, strict=True) if letter not in _SPACE)
    return Field(stored.layout, sizes, stored.dtype)


def _box(stored: Stored, array: StoredArray, spans: Sequence[slice]) -> tuple[slice, ...]:
    space = dict(zip(_SPACE, spans, strict=True))
    return tuple(space.get(letter, slice(0, size)) for letter, size in zip(stored.layout, array.shape, strict=True))
