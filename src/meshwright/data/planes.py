"""Read one box of a NIfTI file: what a rank owns, and nothing it would have to throw away later.

A plane of constant z is one run of bytes, and some planes are read at a time. Of a plain file exactly the box is read.
A compressed one is a stream: it is decoded up to the last row of the box and kept only inside; where several ranks of
one host want boxes of it, one of them decodes it into a copy on the local disk, once, and all read their boxes there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from meshwright.data import once
from meshwright.data.arrays import SLAB_BYTES, Array, Slab, Spans, checked, sizes
from meshwright.data.gunzip import Gunzip
from meshwright.data.nifti import Volume, truncated
from meshwright.data.raw import RawArray
from meshwright.errors import DataError

BLOCK_BYTES = 1 << 17  # planes read at a time: they and their values in float32 stay in the processor's cache


class Planes:
    """Iterate over the planes of a box of a volume, in stored numbers, each [h, w], a channel behind the other.

    `decoded_bytes` counts as it goes what comes from the file, `shared_bytes` what comes from the copy of this host.
    `spans` are slices (D, H, W, or C, D, H, W) inside the shape; an empty box has no planes and reads nothing. At most
    one plane, over the whole width, is in memory. Raises `DataError` for a box outside of the volume and for data
    that ends early.
    """

    def __init__(self, volume: Volume, spans: Sequence[slice]) -> None:
        self.volume = volume
        self.decoded_bytes = self.shared_bytes = 0
        array = NiftiArray(volume)
        spans = tuple(spans)
        self.spans = checked(array, spans if len(spans) == len(array.shape) else (slice(0, 1), *spans))[-3:]
        self.channels = spans[0] if len(array.shape) == 4 and len(spans) == 4 else slice(0, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        d, h, w = (span.stop - span.start for span in self.spans)
        return d, h, w

    @property
    def box_bytes(self) -> int:
        """The bytes that no reader could do without."""
        return math.prod(self.shape) * (self.channels.stop - self.channels.start) * self.volume.dtype.itemsize

    def __iter__(self) -> Iterator[Array]:
        for _, _, planes in self.blocks(1):
            yield from planes

    def blocks(self, most_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Array]]:
        """Some planes at a time: (channel, first plane, [k, h, w]), counted from the beginning of the box."""
        if self.box_bytes == 0:
            return
        depth, height, width = self.spans
        raw = _uncompressed(self, whole=self.box_bytes == self.volume.data_bytes)
        step = max(1, most_bytes // self._plane_bytes)
        at = (
            (c, slice(z, min(z + step, depth.stop)))
            for c in range(self.channels.start, self.channels.stop)
            for z in range(depth.start, depth.stop, step)
        )
        if raw is None:
            yield from self._stream(at)
            return
        for c, z in at:
            planes, read_bytes = raw.read((slice(c, c + 1), z, height, width))
            if raw.shared:
                self.shared_bytes += read_bytes
            else:
                self.decoded_bytes += read_bytes
            yield c - self.channels.start, z.start - depth.start, planes[0]

    @property
    def _plane_bytes(self) -> int:
        return math.prod(self.volume.shape[1:]) * self.volume.dtype.itemsize

    def _stream(self, at: Iterator[tuple[int, slice]]) -> Iterator[tuple[int, int, Array]]:
        depth, height, width = self.spans
        dtype, row = self.volume.dtype, self.volume.shape[2]
        row_bytes, plane_bytes = row * dtype.itemsize, self._plane_bytes
        with _decoded(self.volume) as stream:
            for c, z in at:
                count = z.stop - z.start
                start = self.volume.offset_bytes + (c * self.volume.shape[0] + z.start) * plane_bytes
                self._take(stream, start + height.start * row_bytes - stream.tell(), keep=False)
                # rows of a plane, and what lies between them and those of the next
                data = self._take(stream, (count - 1) * plane_bytes + (height.stop - height.start) * row_bytes)
                if stream.tell() == self.volume.offset_bytes + self.volume.data_bytes:
                    _see_end(self.volume, stream)
                strides = (plane_bytes, row_bytes, dtype.itemsize)
                planes = np.ndarray((count, height.stop - height.start, row), dtype, data, 0, strides)
                yield c - self.channels.start, z.start - depth.start, planes[:, :, width]

    def _take(self, stream: Gunzip, size: int, *, keep: bool = True) -> bytes:
        """Decode the next `size` bytes; return them if they are to be kept."""
        data, before = b"", stream.tell()
        try:
            if keep:
                data = stream.read(size)
            else:
                stream.skip(size)
        except (EOFError, zlib.error):
            raise truncated(self.volume, stream.tell()) from None
        finally:
            self.decoded_bytes += stream.tell() - before
        if stream.tell() - before < size:
            raise truncated(self.volume, stream.tell())
        return data


def _decoded(volume: Volume) -> Gunzip:
    return Gunzip(volume.path)


def _see_end(volume: Volume, stream: Gunzip) -> None:
    """Whoever has decoded all of a stream compares its checksum, which the decoder does at the end."""
    try:
        while stream.skip(SLAB_BYTES):
            pass
    except (EOFError, zlib.error) as error:
        raise DataError(f"{volume.path}: truncated or damaged: {error}. Fetch the file again.") from None


def _uncompressed(reader: Planes, *, whole: bool, wait: bool = True) -> RawArray | None:
    """The numbers of a volume as they lie in a file: the volume's own, or the copy of this host.

    None if the stream has to be decoded: nobody on this host would share it, or there is no room for the copy.
    `whole`: a rank that takes everything has nobody to share with, so it takes a copy but makes none.
    """
    volume = reader.volume
    shape = (volume.channels, *volume.shape)
    if not volume.compressed:
        return RawArray(volume.path, shape, volume.dtype, volume.offset_bytes)
    if not once.several_ranks():
        return None
    key = once.identity((volume.path,), "decoded", volume.offset_bytes, volume.data_bytes)
    file = once.found(key) if whole else _copy(volume, reader, key, wait=wait)
    name = f"the decoded copy of {volume.path}"
    return None if file is None else RawArray(volume.path, shape, volume.dtype, 0, label=name, handle=file, shared=True)


def _copy(volume: Volume, reader: Planes, key: str, *, wait: bool) -> BinaryIO | None:
    def decode(file: BinaryIO) -> None:
        with _decoded(volume) as stream:
            reader._take(stream, volume.offset_bytes, keep=False)
            for start in range(0, volume.data_bytes, SLAB_BYTES):
                file.write(reader._take(stream, min(SLAB_BYTES, volume.data_bytes - start)))
            _see_end(volume, stream)

    return once.once(key, volume.data_bytes, decode, wait=wait)


def prepare(readers: Sequence[Planes], *, wait: bool = False) -> None:
    """Decode the files that no other rank of this host has decoded; without `wait`, those that none is decoding now,
    so that several ranks share the work."""
    for reader in readers:
        if reader.box_bytes not in (0, reader.volume.data_bytes):
            _uncompressed(reader, whole=False, wait=wait)


def read_box(volume: Volume, spans: Sequence[slice]) -> tuple[Array, int]:
    """The values of a box as float32 [d, h, w], and the bytes decoded for it. Raises as `Planes` does."""
    planes = Planes(volume, spans)
    box = np.empty(planes.shape, np.float32)
    for index, plane in enumerate(planes):
        box[index] = volume.scale(plane)
    return box, planes.decoded_bytes


@dataclass(frozen=True)
class NiftiArray:
    """A NIfTI file as a `StoredArray`: [D, H, W], or [C, D, H, W] if it has channels."""

    volume: Volume
    chunks: None = None

    @property
    def name(self) -> str:
        return str(self.volume.path)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.volume.channels, *self.volume.shape)[self.volume.channels == 1 :]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.volume.dtype

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.volume.spacing_mm

    @property
    def path(self) -> Path:
        return self.volume.path

    def scale(self, raw: Array) -> Array:
        return self.volume.scale(raw)

    def prepare(self, spans: Sequence[slice]) -> int:
        """Decode the stream into the copy of this host, unless the box is empty or everything."""
        reader = Planes(self.volume, spans)
        prepare([reader], wait=True)
        return reader.decoded_bytes

    def slabs(self, spans: Sequence[slice]) -> Iterator[Slab]:
        """Some planes at a time, as the file has them. Raises `DataError`."""
        box = checked(self, spans)
        reader, before, shared_before = Planes(self.volume, box), 0, 0
        for channel, z, planes in reader.blocks():
            rows = slice(z, z + len(planes))
            where: Spans = (rows,) if len(box) == 3 else (slice(channel, channel + 1), rows)
            values = planes if len(box) == 3 else planes[None]
            yield Slab(where, values, reader.decoded_bytes - before, reader.shared_bytes - shared_before)
            before, shared_before = reader.decoded_bytes, reader.shared_bytes

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        """The box in stored numbers, and the bytes decoded for it. Raises `DataError`."""
        values, read_bytes = np.empty(sizes(checked(self, spans)), self.dtype), 0
        for slab in self.slabs(spans):
            values[slab.where] = slab.values
            read_bytes += slab.read_bytes
        return values, read_bytes
