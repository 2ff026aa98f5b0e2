"""What training asks of data: any volume, and of it only the part that a rank owns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from meshwright.errors import DataError

IMAGE_BYTES = 4  # float32
LABEL_BYTES = 1  # uint8


@dataclass(frozen=True)
class ReadStats:
    """What a part cost beside what it had to cost, in bytes of this rank. Sums are over the parts read so far."""

    read_bytes: int = 0  # decoded from files
    ideal_read_bytes: int = 0  # of these, bytes that lie inside the part
    part_bytes: int = 0  # kept in memory
    ideal_part_bytes: int = 0  # image as float32 and label as uint8
    peak_bytes: int = 0  # most that reading held at one moment, the part included

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(
            self.read_bytes + other.read_bytes,
            self.ideal_read_bytes + other.ideal_read_bytes,
            self.part_bytes + other.part_bytes,
            self.ideal_part_bytes + other.ideal_part_bytes,
            max(self.peak_bytes, self.part_bytes + other.peak_bytes),
        )


class Part(NamedTuple):
    """A rank's part of samples: image [n, 1, d, h, w] float32, label [n, d, h, w] uint8, and what it cost."""

    image: Tensor
    label: Tensor
    stats: ReadStats


class VolumeSource(Protocol):
    """Labelled volumes that can be read in parts. Reading is a pure function of the files and the arguments."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name per sample, for messages and reports."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label value, from 0."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """D, H, W of sample `index`."""

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """The size of a voxel of sample `index` along D, H, W."""

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` (slices of D, H, W, as `mw.interval` gives them) of sample `index`; raises `DataError`."""


def kept(image: Tensor, label: Tensor, *, read_bytes: int, ideal_read_bytes: int, transient_bytes: int) -> Part:
    """A `Part` of arrays [d, h, w] with its bytes counted; `transient_bytes` were needed only while reading."""
    part_bytes = image.numel() * image.element_size() + label.numel() * label.element_size()
    ideal_part_bytes = math.prod(image.shape) * (IMAGE_BYTES + LABEL_BYTES)
    stats = ReadStats(read_bytes, ideal_read_bytes, part_bytes, ideal_part_bytes, part_bytes + transient_bytes)
    return Part(image[None, None], label[None], stats)


def batch_shape(source: VolumeSource, indices: Sequence[int]) -> tuple[int, int, int, int, int]:
    """[N, 1, D, H, W] of a batch of samples. Raises `DataError` if their sizes differ."""
    shapes = [source.shape(index) for index in indices]
    for index, shape in zip(indices, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"{source.names[indices[0]]} has shape {shapes[0]} but {source.names[index]} has {shape} (D, H, W); "
                "samples of one batch need one size: crop or resample them, or set the batch to 1"
            )
    return (len(indices), 1, *shapes[0])


def read_batch(source: VolumeSource, indices: Sequence[int], spans: Sequence[slice]) -> Part:
    """The part `spans` (slices of N, C, D, H, W, as `mw.interval(batch_shape(...), plan, rank)` gives them).

    Only the samples inside the first slice are read. Raises `DataError` as the source does.
    """
    _, _, d, h, w = batch_shape(source, indices)
    parts = [source.read(index, spans[2:]) for index in indices[spans[0]]]
    if not parts:  # more ranks along the sample axis than samples
        sizes = [len(range(*span.indices(size))) for span, size in zip(spans[2:], (d, h, w), strict=True)]
        return Part(torch.empty(0, 1, *sizes), torch.empty(0, *sizes, dtype=torch.uint8), ReadStats())
    if len(parts) == 1:
        return parts[0]
    stats = sum((part.stats for part in parts), ReadStats())
    return Part(torch.cat([part.image for part in parts]), torch.cat([part.label for part in parts]), stats)


class Kept:
    """Reads each part once and keeps it in memory: for data of which a rank's share fits. Wraps any source."""

    def __init__(self, source: VolumeSource) -> None:
        self._source = source
        self._parts: dict[tuple[int, tuple[tuple[int, int], ...]], Part] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    def shape(self, index: int) -> tuple[int, int, int]:
        return self._source.shape(index)

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self._source.spacing_mm(index)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """As the source does; the second time the same tensors come back, to be read and not written."""
        key = (index, tuple((span.start, span.stop) for span in spans))
        if key not in self._parts:
            self._parts[key] = self._source.read(index, spans)
        return self._parts[key]

    @property
    def stats(self) -> ReadStats:
        """The cost of all parts that are kept."""
        return sum((part.stats for part in self._parts.values()), ReadStats())
