"""Zarr arrays, version 2 and 3, sharded ones too: read chunk by chunk by zarr, from local folders only.

The metadata is read here first: only codecs that decode numbers are let through (`pickle` is one that Zarr 2 knows),
whatever a file asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from meshwright.data.arrays import Array, RandomAccess, checked, chunk_bytes, see_numbers, spacing_of
from meshwright.data.retry import listed, number, retried
from meshwright.errors import DataError

# what a codec may be called that decodes numbers and nothing else
CODECS = frozenset(
    {"bytes", "transpose", "sharding_indexed", "crc32", "crc32c", "adler32", "fletcher32", "blosc", "gzip", "zlib"}
    | {"zstd", "lz4", "bz2", "lzma", "shuffle", "delta", "fixedscaleoffset", "packbits", "bitround", "quantize"}
    | {"pcodec", "zfpy"}
)


@dataclass(frozen=True)
class ZarrArray(RandomAccess):
    """An array in a Zarr folder. `chunks` are the inner ones where it is sharded."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    spacing_mm: tuple[float, float, float] | None = None
    written: tuple[tuple[int, int], ...] = ()  # size and time of change of the metadata when the array was opened

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.path)

    @cached_property
    def _opened(self) -> Any:
        return _open(self.path)  # holds no file open

    def read(self, spans: Sequence[slice]) -> tuple[Array, int]:
        """The box in stored numbers; the bytes are those of the chunks it touches. Raises `DataError`.

        A chunk that is not there holds the array's fill value: that is what Zarr defines, not a missing file.
        """
        box = checked(self, spans)

        def once() -> Array:
            found: Array = _guarded(self.path, lambda: np.asarray(self._opened[box]))
            if self.written and _written(self.path) != self.written:  # chunks may have been read as what they are not
                raise DataError(f"{self.path}: it was written anew after it had been opened; start again")
            return found

        return retried(once, self.name), chunk_bytes(self, box)


def zarr() -> ModuleType:
    """The module. Raises `DataError` if it is not installed."""
    try:
        import zarr as module
    except ModuleNotFoundError:
        raise DataError("reading Zarr needs zarr 3: pip install 'meshwright[data]'") from None
    return module


def is_array(path: Path) -> bool:
    """Whether `path` is the folder of an array (of a group it is not)."""
    if (path / ".zarray").is_file():
        return True
    return (path / "zarr.json").is_file() and _metadata(path / "zarr.json").get("node_type") == "array"


def is_group(path: Path) -> bool:
    """Whether `path` is the folder of a group."""
    if (path / ".zgroup").is_file():
        return True
    return (path / "zarr.json").is_file() and _metadata(path / "zarr.json").get("node_type") == "group"


def arrays(path: Path) -> tuple[str, ...]:
    """The names of the arrays directly inside a group."""
    return tuple(child.name for child in listed(path) if child.is_dir() and is_array(child))


def open_zarr(path: Path, dims: int = 3) -> ZarrArray:
    """Open the array in folder `path`, reading no chunk. Raises `DataError`, below `dims` dims too."""
    if not path.is_dir():
        raise DataError(f"{path}: no such Zarr folder")
    if not is_array(path):
        inside = ", ".join(arrays(path)) if is_group(path) else ""
        raise DataError(f"{path}: not a Zarr array" + (f"; this group has: {inside}" if inside else ""))
    files = [file for file in (path / ".zarray", path / "zarr.json") if file.is_file()]  # zarr chooses between both
    named = [name for file in files for name in _codecs(_metadata(file))]
    wrong = [name for name in named if name.removeprefix("numcodecs.") not in CODECS]
    if wrong:
        raise DataError(
            f"{path}: codec {wrong[0]!r} is not read here: it is not one that only decodes numbers; write the array "
            "again with blosc, zstd or gzip"
        )
    written = retried(lambda: _written(path), path)
    found = retried(lambda: _guarded(path, lambda: _open(path)), path)
    dtype, shape = np.dtype(found.dtype), tuple(int(size) for size in found.shape)
    see_numbers(str(path), dtype, shape, dims)
    chunks = tuple(int(size) for size in found.chunks)
    return ZarrArray(path, shape, dtype, chunks, spacing_of(found.attrs, str(path)), written)


def _written(path: Path) -> tuple[tuple[int, int], ...]:
    states = [(path / name).stat() for name in (".zarray", "zarr.json") if (path / name).is_file()]
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


def _open(path: Path) -> Any:
    return zarr().open_array(path, mode="r")


def _guarded(path: Path, read: Any) -> Any:
    """Zarr and its codecs say anything from `ValueError` to `RuntimeError` for bytes that they cannot decode."""
    try:
        return read()
    except (DataError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and number(error) is None:
            raise DataError(f"{path}: truncated or damaged: {error}. Fetch it again.") from None
        raise
    except Exception as error:
        raise DataError(f"{path}: truncated or damaged: {type(error).__name__}: {error}. Fetch it again.") from error


def _metadata(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(retried(lambda: file.read_text(encoding="utf-8"), file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not JSON: {error}; the metadata is truncated or damaged") from None
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _codecs(metadata: Mapping[str, Any]) -> Iterator[str]:
    """The names of all codecs, those inside shards too."""
    named = [*(metadata.get("codecs") or ()), *(metadata.get("filters") or ()), metadata.get("compressor")]
    for codec in named:
        if codec is None:
            continue
        if isinstance(codec, str):
            yield codec
            continue
        yield str(codec.get("name", codec.get("id")))
        configuration = codec.get("configuration") or {}
        yield from _codecs(configuration)
        yield from _codecs({"codecs": configuration.get("index_codecs")})
