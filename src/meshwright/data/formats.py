"""One road to every format: a path, or a path and the name of a dataset, to a `StoredArray`."""

from __future__ import annotations

from pathlib import Path

from meshwright.data.arrays import StoredArray
from meshwright.data.hdf5 import datasets, open_hdf5
from meshwright.data.nifti import open_volume
from meshwright.data.npy import open_npy
from meshwright.data.planes import NiftiArray
from meshwright.data.retry import file_errors
from meshwright.data.zarrs import open_zarr
from meshwright.errors import DataError

NIFTI, HDF5, NPY, ZARR = (".nii", ".nii.gz"), (".h5", ".hdf5", ".he5"), (".npy",), (".zarr",)
ENDINGS = (*NIFTI, *HDF5, *NPY, *ZARR)


def ending(name: str) -> str:
    """The ending of a file name that says its format, or "" for a file of another kind."""
    return next((known for known in ENDINGS if name.lower().endswith(known)), "")


@file_errors()
def open_array(where: str | Path, dims: int = 3) -> StoredArray:
    """The array at `where`: a NIfTI or .npy file, a Zarr folder, "file.h5::dataset", "folder.zarr::array".

    Without a name an HDF5 file must hold one dataset. Only the header is read. Raises `DataError`, also for an array of
    fewer than `dims` dims.
    """
    text, _, dataset = str(where).partition("::")
    path, kind = Path(text), ending(text)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if dataset and kind not in (*HDF5, *ZARR):
        raise DataError(f"{where}: only HDF5 files and Zarr folders have named datasets")
    if kind in NIFTI:
        return NiftiArray(open_volume(path))
    if kind in NPY:
        return open_npy(path, dims)
    if kind in HDF5:
        return open_hdf5(path, dataset or _only_dataset(path), dims)
    if kind in ZARR or path.is_dir():
        return open_zarr(path / dataset if dataset else path, dims)
    raise DataError(f"{path}: unknown format; known endings: {', '.join(ENDINGS)}")


def _only_dataset(path: Path) -> str:
    found = datasets(path)
    if len(found) != 1:
        raise DataError(f"{path}: {len(found)} datasets ({', '.join(found) or 'none'}); name one: {path}::NAME")
    return found[0]
