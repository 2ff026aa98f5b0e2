"""HDF5 datasets: contiguous ones are read as plain bytes, chunked ones (compressed or not) chunk by chunk by h5py.

The file is opened for each read and closed again: a handle that is kept would be shared by forked workers and go stale
with its file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from meshwright.data.arrays import Array, RandomAccess, checked, chunk_bytes, see_numbers, spacing_of
from meshwright.data.hdf5_chunks import located
from meshwright.data.raw import RawArray
from meshwright.data.retry import TRANSIENT, number, retried
from meshwright.errors import DataError


@dataclass(frozen=True)
class ChunkedDataset(RandomAccess):
    """A dataset that HDF5 has to put together: chunked, compact, virtual, or not written at all."""

    path: Path
    dataset: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    spacing_mm: tuple[float, float, float] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.path}::{self.dataset}"

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        """The box in stored numbers; the bytes are those of the chunks it touches. Raises `DataError`."""
        box = checked(self, spans)

        def once() -> Array:
            with self._file() as file, damage_named(self.name):
                chunks = located(file[self.dataset], box)
                values = None if chunks is None else chunks.read(box)
                return np.asarray(file[self.dataset][box]) if values is None else values

        values = retried(once, self.name)
        return values, values.nbytes if self.chunks is None else chunk_bytes(self, box)

    def _file(self) -> AbstractContextManager[Any]:
        return opened(self.path)


def h5py() -> ModuleType:
    """The module. Raises `DataError` if it is not installed."""
    try:
        import h5py as module
    except ModuleNotFoundError:
        raise DataError("reading HDF5 files needs h5py: pip install 'meshwright[data]'") from None
    return module


@contextmanager
def opened(path: Path, **how: Any) -> Iterator[Any]:
    """The file, for reading; `how` may name a driver. Raises `DataError` if it is none or truncated, `OSError` for what
    may pass."""
    module = h5py()
    try:
        file = module.File(path, "r", locking="best-effort", **how)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or number(error) is not None:
            raise
        raise DataError(f"{path}: not an HDF5 file, or truncated: {error}. Fetch the file again.") from None
    with file:
        yield file


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """HDF5 says `OSError` or `RuntimeError` for bytes that it cannot decode."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and number(error) in TRANSIENT:
            raise
        raise DataError(f"{name}: truncated or damaged: {error}. Fetch the file again.") from None


def datasets(path: Path) -> tuple[str, ...]:
    """The names of all datasets in a file, groups before them: "scan1/image". Raises `DataError`."""
    module = h5py()

    def once() -> tuple[str, ...]:
        found: list[str] = []
        with opened(path) as file, damage_named(str(path)):
            file.visititems(lambda name, item: found.append(name) if isinstance(item, module.Dataset) else None)
        return tuple(found)

    return retried(once, path)


def _lies_plain(item: Any) -> bool:
    """Whether the bytes in the file are numpy's: one block in this file, and numbers that use all of their bits."""
    module = h5py()
    numpys = bool(module.h5t.py_create(item.dtype, logical=True) == item.id.get_type())
    written = item.id.get_space_status() == module.h5d.SPACE_STATUS_ALLOCATED  # else get_offset may say anything
    return numpys and written and item.chunks is None and not item.external and not item.is_virtual


def _see_sources(item: Any, name: str) -> None:
    """Raise `DataError` if a virtual dataset's file is missing: HDF5 would give the fill value, and say nothing."""
    for source in item.virtual_sources() if item.is_virtual else ():
        file = source.file_name.replace("%%", "%")
        places = (Path(item.file.filename).parent / file, Path(file))
        if file != "." and "%" not in source.file_name and not any(place.is_file() for place in places):
            raise DataError(
                f"{name}: a virtual dataset of {file}, which is missing; put it beside {item.file.filename}"
            )


def open_hdf5(path: Path, dataset: str, dims: int = 3) -> RawArray | ChunkedDataset:
    """Open `dataset` of a file, reading no data. Raises `DataError` for what is missing, damaged, or no numbers in at
    least `dims` dims."""
    name = f"{path}::{dataset}"

    def once() -> RawArray | ChunkedDataset:
        with opened(path) as file, damage_named(name):
            item = file.get(dataset)
            if not isinstance(item, h5py().Dataset):
                known = ", ".join(datasets(path)) or "none"
                raise DataError(f"{name}: no such dataset; the file has: {known}")
            shape, dtype = tuple(int(size) for size in item.shape or ()), item.dtype
            see_numbers(name, dtype, shape, dims)
            spacing = spacing_of(item.attrs, name)
            _see_sources(item, name)
            here = Path(item.file.filename) == path  # an external link leads to another file, and its offset is there
            offset = item.id.get_offset() if here and _lies_plain(item) else None
            if offset is None:
                return ChunkedDataset(path, dataset, shape, dtype, item.chunks, spacing)
            return RawArray(path, shape, dtype, int(offset), label=name, spacing_mm=spacing)

    array = retried(once, path)
    if isinstance(array, RawArray):
        array.see_complete()
    return array
