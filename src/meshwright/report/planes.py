"""The planes of the held-out volume in `slices.npz`, as frozen values."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.errors import DataError

_KINDS = {"image": "biuf", "truth": "iu", "prediction": "iu"}


@dataclass(frozen=True)
class Plane:
    """One plane through the held-out volume: image (any number type), truth and prediction (class indices)."""

    image: npt.NDArray[Any]
    truth: npt.NDArray[Any]
    prediction: npt.NDArray[Any]


@dataclass(frozen=True)
class Slices:
    """One plane across D (rows H, columns W), one across H (D, W) and one across W (D, H) of the held-out volume.

    `at` are their positions along D, H, W: the middle, where the file does not say.
    """

    planes: tuple[Plane, Plane, Plane]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    at: tuple[int, int, int]


def load_slices(path: Path) -> Slices:
    """Read `path`. Raises `DataError` naming the array that is missing or has the wrong shape or type."""
    try:
        with path.open("rb") as file:  # np.load leaves the file open when it is damaged
            archive = np.load(file, allow_pickle=False)
            named = isinstance(archive, np.lib.npyio.NpzFile)  # otherwise one array without a name
            arrays = {name: archive[name] for name in archive.files} if named else {}
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the run has ended; the run directory is incomplete") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from None
    for name, kinds in (("shape", "iu"), ("spacing_mm", "iuf")):
        entry = _array(arrays, name, path)
        if entry.shape != (3,) or entry.dtype.kind not in kinds or not (entry > 0).all():
            raise DataError(f"{path}: {name} must be three positive numbers (D, H, W), found {entry.tolist()}")
    depth, height, width = (int(size) for size in arrays["shape"])
    z_mm, y_mm, x_mm = (float(size) for size in arrays["spacing_mm"])
    planes = (
        _plane(arrays, "d", (height, width), path),
        _plane(arrays, "h", (depth, width), path),
        _plane(arrays, "w", (depth, height), path),
    )
    return Slices(planes, (depth, height, width), (z_mm, y_mm, x_mm), _positions(arrays, (depth, height, width), path))


def _positions(arrays: dict[str, npt.NDArray[Any]], shape: tuple[int, int, int], path: Path) -> tuple[int, int, int]:
    depth, height, width = shape
    if "at" not in arrays:
        return depth // 2, height // 2, width // 2
    entry = arrays["at"]
    if entry.shape != (3,) or entry.dtype.kind not in "iu" or (entry < 0).any() or (entry >= shape).any():
        raise DataError(f"{path}: at must be three positions inside the volume of {shape}, found {entry.tolist()}")
    return int(entry[0]), int(entry[1]), int(entry[2])


def _plane(arrays: dict[str, npt.NDArray[Any]], way: str, face: tuple[int, int], path: Path) -> Plane:
    for what, kinds in _KINDS.items():
        array = _array(arrays, f"{what}_{way}", path)
        if array.shape != face or array.dtype.kind not in kinds:
            raise DataError(
                f"{path}: {what}_{way} is {array.dtype} of shape {array.shape}; "
                f"the volume asks for {face} of {'numbers' if what == 'image' else 'whole numbers'}"
            )
    return Plane(*(arrays[f"{what}_{way}"] for what in _KINDS))


def _array(arrays: dict[str, npt.NDArray[Any]], name: str, path: Path) -> npt.NDArray[Any]:
    if name not in arrays:
        raise DataError(f"{path}: has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    return arrays[name]
