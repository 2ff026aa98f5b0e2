"""NIfTI files: what the header says, whether the data behind it is complete, whether two files match.

The file stores x fastest and z slowest. Everything here is in the order of the tensor: D = z, H = y, W = x.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from meshwright.data.arrays import Array
from meshwright.data.retry import retried
from meshwright.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
APART = 0.1  # of a voxel


@dataclass(frozen=True)
class Volume:
    """A NIfTI file of which only the header has been read. `shape` and `spacing_mm` are in D, H, W order.

    What NIfTI counts behind x, y, z (a time, a modality) are the channels here; they are the slowest in the file.
    """

    path: Path
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str  # where x, y and z point to, such as "RAS"
    dtype: np.dtype[Any]
    offset_bytes: int  # where the data starts, after decompression
    slope: float
    inter: float
    compressed: bool
    channels: int = 1
    affine: tuple[tuple[float, ...], ...] = ()  # voxel (x, y, z) → mm: three rows of four numbers

    @property
    def data_bytes(self) -> int:
        return self.channels * math.prod(self.shape) * self.dtype.itemsize

    def scale(self, raw: Array) -> Array:
        """Stored numbers → float32 values, `raw * slope + inter`, rounded once."""
        if self.slope == 1.0 and self.inter == 0.0:
            return raw.astype(np.float32)
        return (raw.astype(np.float64) * self.slope + self.inter).astype(np.float32)


def _nibabel() -> ModuleType:
    try:
        import nibabel
    except ModuleNotFoundError:
        raise DataError("reading NIfTI files needs nibabel: pip install 'meshwright[nifti]'") from None
    return nibabel


def open_volume(path: str | Path) -> Volume:
    """Read the header and see that the data behind it is complete, without reading the data.

    The length of a plain file is its size, of a compressed one what its last four bytes say; only if these disagree
    with the header is the file decoded to count. Raises `DataError` for a file that is missing, no NIfTI, not 3-D
    (or 4-D with channels), or truncated.
    """
    where = Path(path)
    return retried(lambda: _opened(where), where)


def _opened(path: Path) -> Volume:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    nibabel = _nibabel()
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise DataError(f"{path}: not a NIfTI file: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file ends or is damaged inside the header: {error}") from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise DataError(f"{path}: a {type(image).__name__}, not a single-file NIfTI (.nii or .nii.gz)")
    proxy = image.dataobj
    shape = tuple(int(size) for size in proxy.shape)
    if len(shape) < 3 or sum(size != 1 for size in shape[3:]) > 1:
        raise DataError(
            f"{path}: a {len(shape)}-D volume of shape {shape}; a volume (x, y, z), or one with channels behind it, is "
            "expected"
        )
    if proxy.dtype.kind not in "iuf":
        raise DataError(f"{path}: values of type {proxy.dtype}; integers or floating-point numbers are expected")
    x_mm, y_mm, z_mm = (float(size) for size in image.header.get_zooms()[:3])
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    volume = Volume(
        path=path,
        shape=(shape[2], shape[1], shape[0]),
        spacing_mm=(z_mm, y_mm, x_mm),
        orientation="".join(axis or "?" for axis in nibabel.aff2axcodes(image.affine)),
        dtype=proxy.dtype,
        offset_bytes=int(proxy.offset),
        slope=float(proxy.slope),
        inter=float(proxy.inter),
        compressed=compressed,
        channels=math.prod(shape[3:]),
        affine=tuple(tuple(map(float, row)) for row in image.affine[:3]),
    )
    _see_complete(volume)
    return volume


def _see_complete(volume: Volume) -> None:
    expected = volume.offset_bytes + volume.data_bytes
    size = volume.path.stat().st_size
    if not volume.compressed:
        if size < expected:
            raise truncated(volume, size)
        return
    with open(volume.path, "rb") as file:
        file.seek(-4, 2)
        stored = int.from_bytes(file.read(4), "little")  # length before compression, modulo 2³²; RFC 1952
    if stored == expected % 2**32:
        return
    with gzip.open(volume.path) as stream:
        found = 0
        try:
            while block := stream.read1(_CHUNK_BYTES):  # read() would drop what it has when the file ends early
                found += len(block)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise truncated(volume, found) from None
    if found < expected:
        raise truncated(volume, found)


def truncated(volume: Volume, found: int) -> DataError:
    """The error for data of which only `found` bytes are there, the header included."""
    expected = volume.offset_bytes + volume.data_bytes
    how = " after decompression" if volume.compressed else ""
    return DataError(
        f"{volume.path}: truncated or damaged: {expected} bytes expected{how}, {found} found. Fetch the file again."
    )


def see_matching(*volumes: Volume) -> None:
    """Raise `DataError` unless all files have the shape and the orientation of the first, and their voxels lie in the
    same places: none further than `APART` of a voxel from where the first file has it."""
    for first, other in zip(volumes[:1] * len(volumes), volumes[1:], strict=False):
        if other.shape != first.shape:
            raise DataError(
                f"{first.path} has shape {first.shape} but {other.path} has {other.shape} (D, H, W = z, y, x); "
                "an image and its label must lie on the same grid: resample one to the other"
            )
        if other.orientation != first.orientation:
            raise DataError(
                f"{first.path} is stored {first.orientation} but {other.path} {other.orientation}; "
                "an image and its label must lie on the same grid: reorient one (nibabel.as_closest_canonical)"
            )
        apart_mm, size_mm = _apart_mm(first, other), min(first.spacing_mm)
        if not apart_mm <= APART * size_mm:  # nor NaN
            raise DataError(
                f"{first.path} and {other.path} have one shape but lie in other places: voxels of equal number are up "
                f"to {apart_mm:.3g} mm apart, with voxels of {_mm(first)} mm and {_mm(other)} mm (D, H, W). An image "
                "and its label must lie on the same grid: resample one to the other, or correct the header (affine) "
                "that is wrong"
            )


def _apart_mm(first: Volume, other: Volume) -> float:
    """How far two voxels of equal number are apart at most, by the affines: at one of the corners, for it is convex."""
    depth, height, width = first.shape
    moved = np.array(first.affine) - np.array(other.affine)
    corners = np.array([(x, y, z, 1) for x in (0, width - 1) for y in (0, height - 1) for z in (0, depth - 1)])
    return float(np.linalg.norm(corners @ moved.T, axis=1).max())


def _mm(volume: Volume) -> str:
    return " × ".join(f"{size:.4g}" for size in volume.spacing_mm)
