"""One pass over whole arrays, piece by piece: mean and spread of an image, the number of classes in labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from meshwright.data.arrays import Array, RandomAccess, StoredArray
from meshwright.data.raw import RawArray
from meshwright.errors import DataError

MOST_CLASSES = 255  # of one byte


class Spent:
    """What reading has cost so far, in bytes."""

    def __init__(self) -> None:
        self.read_bytes = self.shared_bytes = self.transient_bytes = 0

    def values(self, array: StoredArray, spans: Sequence[slice]) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """The box in pieces, as float32 that may be written to."""
        for slab in array.slabs(spans):
            self.read_bytes += slab.read_bytes
            self.shared_bytes += slab.shared_bytes
            # stored numbers, their values in float64 and float32
            self.transient_bytes = max(self.transient_bytes, slab.values.nbytes + 12 * slab.values.size)
            values = array.scale(slab.values)
            yield slab.where, values if values.flags.writeable else values.copy()

    def filled(self, array: StoredArray, spans: Sequence[slice], target: Array) -> Iterator[tuple[slice, ...]]:
        """Write the values of the box to `target`, cast to its type; where each piece of it lies, once it is there."""
        if isinstance(array, RawArray) and not array.fortran and array.dtype == target.dtype:
            for where, box in array.pieces(spans):
                if target[where].flags.c_contiguous:
                    self.read_bytes += array.read_to(box, target[where])
                else:  # of several channels
                    target[where], read_bytes = array.read(box)
                    self.read_bytes += read_bytes
                yield where
            return
        for slab in array.slabs(spans):
            self.read_bytes += slab.read_bytes
            self.shared_bytes += slab.shared_bytes
            if isinstance(array, RandomAccess):  # the stored numbers are the values
                self.transient_bytes = max(self.transient_bytes, slab.values.nbytes)
                np.copyto(target[slab.where], slab.values, casting="unsafe")
            else:  # and their values in float64 and float32
                self.transient_bytes = max(self.transient_bytes, slab.values.nbytes + 12 * slab.values.size)
                target[slab.where] = array.scale(slab.values)
            yield slab.where

    def whole_numbers(self, array: StoredArray, spans: Sequence[slice]) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """The box of an array that `has_whole_numbers` in pieces, as they are stored."""
        for slab in array.slabs(spans):
            self.read_bytes += slab.read_bytes
            self.shared_bytes += slab.shared_bytes
            self.transient_bytes = max(self.transient_bytes, slab.values.nbytes)
            yield slab.where, slab.values


def has_whole_numbers(array: StoredArray) -> bool:
    """Whether the values of an array are the stored numbers, and these are whole by their type."""
    if array.dtype.kind not in "biu":
        return False
    return [float(value) for value in array.scale(np.array([0, 1], array.dtype))] == [0.0, 1.0]  # scales are linear


def is_class(values: Array, count: int) -> Array:
    """Which values are whole numbers from 0 to `count` − 1."""
    found: Array = (values >= 0) & (values < count) & (values == np.floor(values))
    return found


def intensity(image: StoredArray, spent: Spent | None = None) -> list[tuple[float, float]]:
    """(mean, standard deviation) of the values that are not 0, a pair for each channel, in one pass, plane by plane.

    The means of planes are merged stably: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
    Raises `DataError` for infinities, NaN, and a channel in which all these values are equal.
    """
    channels = image.shape[0] if len(image.shape) == 4 else 1
    merged = [(0, 0.0, 0.0)] * channels
    for where, values in (spent or Spent()).values(image, tuple(slice(0, size) for size in image.shape)):
        block = values.reshape(-1, *values.shape[-3:])
        first = where[0].start or 0 if len(image.shape) == 4 else 0
        for position, planes in enumerate(block):
            for plane in planes:
                merged[first + position] = _merge(merged[first + position], plane.astype(np.float64), image.name)
    for channel, (_, _, squares) in enumerate(merged):
        if squares <= 0:
            which = f" in channel {channel}" if channels > 1 else ""
            raise DataError(f"{image.name}: no two different values other than 0{which}; is this the image?")
    return [(float(mean), math.sqrt(squares / count)) for count, mean, squares in merged]


def _merge(merged: tuple[int, float, float], plane: Array, name: str) -> tuple[int, float, float]:
    """(count, mean, sum of squared deviations) with the values of one more plane that are not 0."""
    if not np.isfinite(plane).all():
        raise DataError(f"{name}: contains NaN or infinity; replace these voxels before training")
    count, mean, squares = merged
    values = plane[plane != 0]
    if not values.size:
        return merged
    shift, total = values.mean() - mean, count + values.size
    return (
        total,
        mean + shift * values.size / total,
        squares + values.var() * values.size + shift**2 * count * values.size / total,
    )


def count_classes(labels: Sequence[StoredArray]) -> tuple[str, ...]:
    """The names "0", "1", … up to the largest value in the labels, each read once, plane by plane.

    Raises `DataError` for labels that are no whole numbers from 0 to 254, or all 0.
    """
    largest = 0
    for label in labels:
        for _, values in Spent().values(label, tuple(slice(0, size) for size in label.shape)):
            wrong = values[~is_class(values, MOST_CLASSES)]
            if wrong.size:
                raise DataError(
                    f"{label.name}: label value {wrong[0]:g}; whole numbers from 0 to {MOST_CLASSES - 1} are "
                    "expected; is this the label?"
                )
            largest = max(largest, int(values.max()))
    if largest == 0:
        raise DataError(f"{labels[0].name} and all other labels hold nothing but 0: there is nothing to learn")
    return tuple(map(str, range(largest + 1)))
