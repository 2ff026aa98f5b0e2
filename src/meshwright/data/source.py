"""What training asks of data: any volume, and of it only the part that a rank owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from meshwright.errors import DataError

IMAGE_BYTES = 4  # float32
LABEL_BYTES = 1  # uint8
_IDEAL_BYTES = {"image": IMAGE_BYTES, "label": LABEL_BYTES}


@dataclass(frozen=True)
class ReadStats:
    """What a part cost beside what it had to cost, in bytes of this rank. Sums are over the parts read so far."""

    read_bytes: int = 0  # decoded from files: whole chunks, whole streams
    ideal_read_bytes: int = 0  # of these, bytes that lie inside the part
    part_bytes: int = 0  # kept in memory
    ideal_part_bytes: int = 0  # image as float32, label as uint8, other fields in their own types
    peak_bytes: int = 0  # most that reading held at one moment, the part included
    shared_bytes: int = 0  # taken from the copy that one rank of this host decoded

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(
            self.read_bytes + other.read_bytes,
            self.ideal_read_bytes + other.ideal_read_bytes,
            self.part_bytes + other.part_bytes,
            self.ideal_part_bytes + other.ideal_part_bytes,
            max(self.peak_bytes, self.part_bytes + other.peak_bytes),
            self.shared_bytes + other.shared_bytes,
        )


@dataclass(frozen=True)
class Field:
    """A named tensor of a sample: `layout` has one letter a dim, D H W the volume's and any other for `sizes`.

    An image of two channels is `Field("CDHW", (2,), torch.float32)`, a label `Field("DHW", (), torch.uint8)`, a vector
    of four numbers `Field("K", (4,), torch.float32)`.
    """

    layout: str
    sizes: tuple[int, ...]  # of the dims of `layout` that are not D, H or W, in order
    dtype: torch.dtype

    def shape(self, volume: Sequence[int]) -> tuple[int, ...]:
        """The shape of this field where the volume, or a box of it, is `volume` = D, H, W."""
        own, space = iter(self.sizes), dict(zip("DHW", volume, strict=True))
        return tuple(space[letter] if letter in space else next(own) for letter in self.layout)

    @property
    def is_volume(self) -> bool:
        """Whether it is cut with the volume; a field without D, H, W belongs to the sample as a whole."""
        return "D" in self.layout


IMAGE = Field("CDHW", (1,), torch.float32)
LABEL = Field("DHW", (), torch.uint8)


class Part(Mapping[str, Tensor]):
    """A rank's part of samples: named tensors [n, …], such as image [n, c, d, h, w] and label [n, d, h, w], and what it
    cost. A plain mapping otherwise."""

    def __init__(self, fields: Mapping[str, Tensor], stats: ReadStats, packed: Tensor | None = None) -> None:
        self._fields, self.stats = dict(fields), stats
        self.packed = packed  # the one buffer of all fields (`Packing.room`): nobody writes to it any more

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def image(self) -> Tensor:
        """[n, c, d, h, w] float32."""
        return self._fields["image"]

    @property
    def label(self) -> Tensor:
        """[n, d, h, w] uint8."""
        return self._fields["label"]


class VolumeSource(Protocol):
    """Labelled volumes that can be read in parts. Reading is a pure function of the files and the arguments."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name per sample, for messages and reports."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label value, from 0."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a sample consists of: at least "image"; the same for all samples."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """D, H, W of sample `index`."""

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """The size of a voxel of sample `index` along D, H, W."""

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` (slices of D, H, W, as `mw.interval` gives them) of sample `index`; raises `DataError`."""


ReadInto = Callable[[int, Sequence[slice], Mapping[str, Tensor]], Part]


def into_of(source: VolumeSource) -> ReadInto | None:
    """`source.read_into`, if it has that: `read`, but into contiguous tensors of the caller, one a field, sized as
    `Field.shape` says. After an error they hold anything."""
    found: ReadInto | None = getattr(source, "read_into", None)
    return found


@runtime_checkable
class Fetching(Protocol):
    """A source that is better asked for the samples of a batch together, before each of them is read."""

    def fetch(self, indices: Sequence[int], spans: Sequence[slice]) -> None: ...


def kept(
    fields: Mapping[str, Tensor],
    *,
    read_bytes: int,
    ideal_read_bytes: int,
    transient_bytes: int,
    shared_bytes: int = 0,
    packed: Tensor | None = None,
) -> Part:
    """A `Part` of one sample's tensors, as [1, …], its bytes counted; `transient_bytes` were needed while reading."""
    part_bytes = sum(tensor.numel() * tensor.element_size() for tensor in fields.values())
    ideal_part_bytes = sum(t.numel() * _IDEAL_BYTES.get(name, t.element_size()) for name, t in fields.items())
    stats = ReadStats(
        read_bytes, ideal_read_bytes, part_bytes, ideal_part_bytes, part_bytes + transient_bytes, shared_bytes
    )
    return Part({name: tensor[None] for name, tensor in fields.items()}, stats, packed)


def widened(spans: Sequence[slice], shape: Sequence[int], halo: int | Sequence[int]) -> tuple[slice, ...]:
    """`spans` with `halo` more positions on both sides (one number, or one a dim), as far as `shape` reaches.

    An empty span stays empty: a rank without positions needs no neighbours.
    """
    wide = [halo] * len(shape) if isinstance(halo, int) else list(halo)
    return tuple(
        slice(max(0, span.start - more), min(size, span.stop + more)) if span.stop > span.start else span
        for span, size, more in zip(spans, shape, wide, strict=True)
    )


def batch_shape(source: VolumeSource, indices: Sequence[int]) -> tuple[int, int, int, int, int]:
    """[N, C, D, H, W] of a batch of samples. Raises `DataError` if their sizes differ."""
    shapes = [source.shape(index) for index in indices]
    for index, shape in zip(indices, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"{source.names[indices[0]]} has shape {shapes[0]} but {source.names[index]} has {shape} (D, H, W); "
                "samples of one batch need one size: crop or resample them, or set the batch to 1"
            )
    (channels,) = source.fields["image"].sizes
    return (len(indices), channels, *shapes[0])


def read_batch(source: VolumeSource, indices: Sequence[int], spans: Sequence[slice]) -> Part:
    """The part `spans` (slices of N, C, D, H, W, as `mw.interval(batch_shape(...), plan, rank)` gives them).

    Only the samples inside the first slice are read. The tensors may be what the source keeps: to be read and not
    written. Raises `DataError` as the source does.
    """
    if isinstance(source, Fetching):
        source.fetch(indices[spans[0]], spans[2:])
    parts = [source.read(index, spans[2:]) for index in indices[spans[0]]]
    if not parts:  # more ranks along the sample axis than samples
        _, _, *volume = batch_shape(source, indices)
        sizes = [len(range(*span.indices(size))) for span, size in zip(spans[2:], volume, strict=True)]
        return Part(
            {name: torch.empty(0, *field.shape(sizes), dtype=field.dtype) for name, field in source.fields.items()},
            ReadStats(),
        )
    if len(parts) == 1:
        return parts[0]
    stats = sum((part.stats for part in parts), ReadStats())
    return Part({name: joined([part[name] for part in parts]) for name in parts[0]}, stats)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of tensors [1, …], without a copy where they lie one behind the other in one buffer."""
    first, nbytes = tensors[0], tensors[0].numel() * tensors[0].element_size()
    adjacent = nbytes > 0 and all(
        tensor.is_contiguous()
        and (tensor.shape, tensor.dtype) == (first.shape, first.dtype)
        and tensor.data_ptr() == first.data_ptr() + number * nbytes
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for number, tensor in enumerate(tensors)
    )
    if not adjacent:
        return torch.cat(list(tensors))
    whole = first.as_strided((len(tensors) * first.numel(),), (1,))
    return whole.view(len(tensors), *first.shape[1:])


class Wrapped:
    """What a source that wraps another one hands on as it is."""

    def __init__(self, source: VolumeSource) -> None:
        self._source = source

    @property
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    @property
    def fields(self) -> Mapping[str, Field]:
        return self._source.fields

    def shape(self, index: int) -> tuple[int, int, int]:
        return self._source.shape(index)

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self._source.spacing_mm(index)
