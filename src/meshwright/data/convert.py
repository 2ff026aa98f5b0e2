"""Pairs in any format → Zarr, HDF5 or `.npy`, cut into chunks that end where the ranks of a plan are cut.

The result is a folder `images/` + `labels/`. Each array is written under a temporary name and renamed when it is whole.
Zarr and `.npy` note each finished slab, so that a call after a kill goes on there; an HDF5 file that was not closed
cannot be trusted, so that one array begins again.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from meshwright.data import hdf5, once, zarrs
from meshwright.data.arrays import Array, StoredArray, sizes
from meshwright.data.folder import stem
from meshwright.data.formats import open_array
from meshwright.data.planes import NiftiArray
from meshwright.data.views import Channels, files_of, parts_of
from meshwright.data.volumes import Pair
from meshwright.errors import DataError
from meshwright.plan.plan import Plan

CHUNK_BYTES = 4 << 20  # of a chunk, at most

Format = Literal["zarr", "hdf5", "npy"]
_ENDING = {"zarr": ".zarr", "hdf5": ".h5", "npy": ".npy"}
Write = Callable[[tuple[slice, ...], Array], None]


class Target(NamedTuple):
    """Where one array goes: `path` when it is whole."""

    array: StoredArray
    path: Path
    chunks: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """As it is stored, unless the file scales its numbers: then float32 values."""
        return self.array.dtype.newbyteorder("=") if _is_plain(self.array) else np.dtype(np.float32)

    @property
    def source(self) -> str:
        """What the array is made from, and how: what a call that goes on must find unchanged."""
        made_from = once.identity(files_of(self.array), *(part.name for part in parts_of(self.array)))
        return f"{made_from} {self.array.shape} {self.chunks} {self.dtype.str}"

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def notes(self) -> Path:
        return self.path.with_name(f".{self.path.name}.done")


def _is_plain(array: StoredArray) -> bool:
    """Whether the stored numbers are the values, and can be written as they are."""
    if isinstance(array, Channels):  # which gives float32
        small = array.dtype.itemsize <= 2 or array.dtype == np.float32
        return small and all(_is_plain(part) for part in array.parts)
    return array.scale(np.array([0, 1], array.dtype)).tolist() == [0, 1]


def chunks_for(shape: tuple[int, ...], plan: Plan, itemsize: int) -> tuple[int, ...]:
    """Chunks of at most `CHUNK_BYTES` whose borders meet every cut of the plan: divisors of the parts' sizes."""
    layout = "CDHW"[-len(shape) :]
    steps = [1] * (len(shape) - 3) + list(shape[-3:])
    for axis, dim in zip(plan.axes, plan.dims(len(shape), layout), strict=True):
        if dim is not None:
            steps[dim] = -(-shape[dim] // axis.size)
    chunk = list(steps)
    while math.prod(chunk) * itemsize > CHUNK_BYTES and max(chunk) > 1:
        dim = max(range(len(chunk)), key=chunk.__getitem__)
        chunk[dim] = max(size for size in range(1, chunk[dim]) if steps[dim] % size == 0)
    return tuple(chunk)


def targets(pairs: tuple[Pair, ...], folder: Path, kind: Format, plan: Plan) -> list[Target]:
    """What is to be written. Raises `DataError` when two samples would get one name."""
    found, names = [], set()
    for pair in pairs:
        path = Path(pair.name.replace("/", "_").replace("::", "_") or pair.image.path.name)
        name = stem(path) or path.name
        for word in ("_image", "_label"):
            name = name.removesuffix(word)
        if name in names:
            raise DataError(f"{pair.image.name}: another sample is called {name} too; rename one of them")
        names.add(name)
        for room, array in (("images", pair.image), ("labels", pair.label)):
            chunks = chunks_for(array.shape, plan, array.dtype.itemsize)
            found.append(Target(array, folder / room / f"{name}{_ENDING[kind]}", chunks))
    return found


def convert(target: Target, kind: Format, done: Callable[[int], None] = lambda size: None) -> None:
    """Write one array, unless it is there; `done` hears the bytes of each slab. Raises `DataError`."""
    if target.path.exists():
        _see_same(target)
        done(math.prod(target.array.shape) * target.dtype.itemsize)
        return
    target.path.parent.mkdir(parents=True, exist_ok=True)
    writer = {"zarr": _zarr, "hdf5": _hdf5, "npy": _npy}[kind]
    try:
        with open(target.notes, "a", encoding="utf-8") as notes:
            _alone(target, notes)
            finished = _finished(target) if kind != "hdf5" else 0
            if not finished:
                notes.truncate(0)
                notes.write(target.source + "\n")
            write, close = writer(target, finished > 0)
            for number, (where, values) in enumerate(_slabs(target.array, target.chunks[-3])):
                if number >= finished:
                    write(where, values().astype(target.dtype, copy=False))
                    notes.write("done\n")
                    notes.flush()
                done(math.prod(sizes(where)) * target.dtype.itemsize)
            close()
            os.replace(target.partial, target.path)
            target.notes.unlink()
    except OSError as error:
        raise DataError(f"{target.path}: cannot be written: {error.strerror or error}") from None


def _alone(target: Target, notes: TextIO) -> None:
    """Hold the lock of the notes until they are closed. Raises `DataError` if another call has it, or is done."""
    try:
        fcntl.flock(notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{target.path}: another call is writing it; wait until it has ended") from None
    if target.path.exists():
        target.notes.unlink(missing_ok=True)
        raise DataError(f"{target.path}: another call has just written it; call again")


def _see_same(target: Target) -> None:
    there = open_array(target.path)
    chunks = target.chunks if there.chunks is not None else None
    if (there.shape, there.dtype, there.chunks) != (target.array.shape, target.dtype, chunks):
        raise DataError(
            f"{target.path} exists and is another array: shape {there.shape}, {there.dtype}, chunks {there.chunks}; "
            f"now {target.array.shape}, {target.dtype}, {target.chunks} is wanted. Remove it, or choose another folder."
        )
    made_ns = target.path.stat().st_mtime_ns
    newer = [file for path in files_of(target.array) for file in _with_inner(path) if file.stat().st_mtime_ns > made_ns]
    if newer:
        raise DataError(f"{target.path} was made before {newer[0]} changed. Remove it, so that it is made anew.")


def _with_inner(path: Path) -> Iterator[Path]:
    """A file, or a folder and all that is in it: chunks that are written in place change no folder."""
    yield path
    if path.is_dir():
        yield from path.rglob("*")


def _finished(target: Target) -> int:
    """How many slabs an earlier call has written and noted; 0 if it wrote something else."""
    if not target.partial.exists() or not target.notes.exists():
        return 0
    first, *notes = target.notes.read_text(encoding="utf-8").split("\n")
    return notes.count("done") if first == target.source else 0


def _slabs(array: StoredArray, step: int) -> Iterator[tuple[tuple[slice, ...], Callable[[], Array]]]:
    """Boxes that are one chunk thick along D, and how to get their values; in order."""
    *lead, depth, height, width = array.shape
    for channel in range(math.prod(lead)):
        part = array.parts[channel] if isinstance(array, Channels) else array
        first = (slice(channel, channel + 1),) * len(lead)
        box = first if part is array else ()
        rest = (slice(0, height), slice(0, width))
        planes = _planes(part, (*box, slice(0, depth), *rest)) if _is_stream(part) else None
        for start in range(0, depth, step):
            span = slice(start, min(start + step, depth))

            def values(
                part: StoredArray = part,
                planes: Iterator[Array] | None = planes,
                wanted: tuple[slice, ...] = (*box, span, *rest),
                shape: tuple[int, ...] = (*(1 for _ in lead), span.stop - span.start, height, width),
            ) -> Array:
                if planes is None:
                    raw = part.read(wanted)[0]
                else:
                    raw = np.concatenate([next(planes) for _ in range(shape[-3])], axis=-3)
                return (raw if _is_plain(part) else part.scale(raw)).reshape(shape)

            if planes is None:
                yield (*first, span, *rest), values
            else:  # a stream passes by, whether it is wanted or not
                taken = values()
                yield (*first, span, *rest), lambda taken=taken: taken  # type: ignore[misc]


def _planes(array: StoredArray, box: tuple[slice, ...]) -> Iterator[Array]:
    """Planes [..., 1, H, W] of a stream, which comes in pieces of any number of them."""
    for slab in array.slabs(box):
        for z in range(slab.values.shape[-3]):
            yield slab.values[..., z : z + 1, :, :]


def _is_stream(array: StoredArray) -> bool:
    return isinstance(array, NiftiArray) and array.volume.compressed


def _zarr(target: Target, again: bool) -> tuple[Write, Callable[[], None]]:
    if not again:
        shutil.rmtree(target.partial, ignore_errors=True)
        attributes = {"spacing_mm": list(target.array.spacing_mm)} if target.array.spacing_mm else {}
        zarrs.zarr().create_array(
            target.partial,
            shape=target.array.shape,
            dtype=target.dtype,
            chunks=target.chunks,
            attributes=attributes,
        )
    array = zarrs.zarr().open_array(target.partial, mode="r+")
    return array.__setitem__, lambda: None


def _hdf5(target: Target, again: bool) -> tuple[Write, Callable[[], None]]:
    target.partial.unlink(missing_ok=True)
    file = hdf5.h5py().File(target.partial, "w")
    array = file.create_dataset(
        "array", target.array.shape, target.dtype, chunks=target.chunks, compression="gzip", shuffle=True
    )
    if target.array.spacing_mm:
        array.attrs["spacing_mm"] = list(target.array.spacing_mm)
    return array.__setitem__, file.close


def _npy(target: Target, again: bool) -> tuple[Write, Callable[[], None]]:
    mode = "r+" if again else "w+"
    shape = None if again else target.array.shape
    array = np.lib.format.open_memmap(target.partial, mode=mode, dtype=target.dtype, shape=shape)

    def write(where: tuple[slice, ...], values: Array) -> None:
        array[where] = values

    return write, array.flush
