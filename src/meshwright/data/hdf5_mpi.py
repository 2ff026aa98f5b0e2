"""HDF5 through MPI-IO, where h5py and its HDF5 library are built with MPI: `data.hdf5_driver` = mpio.

Each rank opens a file by itself (`MPI_COMM_SELF`) and reads independently: ranks read at times of their own, threads
ahead of the computation, so nothing here may be collective. What MPI-IO brings is its knowledge of the file system
(striping, hints); every dataset goes through it, contiguous ones too, which are else read as plain bytes.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from meshwright.data.arrays import StoredArray
from meshwright.data.hdf5 import ChunkedDataset, h5py, opened
from meshwright.data.raw import RawArray
from meshwright.data.views import Channels, Sample
from meshwright.errors import DataError

_COLLECTIVE = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK")  # what mpirun and srun tell their ranks


@dataclass(frozen=True)
class MpiDataset(ChunkedDataset):
    """A dataset of any layout, read by HDF5 with its MPI-IO driver."""

    def _file(self) -> AbstractContextManager[Any]:
        return opened(self.path, driver="mpio", comm=communicator())


def communicator() -> Any:
    """MPI's communicator of this process alone. Raises `DataError` that names what is missing."""
    if not h5py().get_config().mpi:
        raise DataError(
            "data.hdf5_driver = mpio: this h5py is built without MPI (h5py.get_config().mpi is False); install mpi4py, "
            "and h5py from source with HDF5_MPI=ON against an HDF5 built with MPI, or leave data.hdf5_driver = "
            "independent"
        )
    launched = next((name for name in _COLLECTIVE if name in os.environ), None)
    if launched is not None:
        raise DataError(
            f"data.hdf5_driver = mpio: these ranks were started by MPI ({launched} is set), which begins and ends "
            "together on all of them, while data are read at times of their own; start them by torchrun or "
            "meshwright itself, or leave data.hdf5_driver = independent"
        )
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise DataError(f"data.hdf5_driver = mpio: h5py is built with MPI but mpi4py cannot be used: {error}") from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise DataError(
            "data.hdf5_driver = mpio: this MPI was started for one thread, but data are read in several; start it with "
            "MPI_THREAD_SERIALIZED or more (mpi4py.rc.thread_level)"
        )
    return MPI.COMM_SELF


def through_mpi(array: StoredArray) -> StoredArray:
    """The same array, read through MPI-IO where it lies in an HDF5 file. Raises `DataError` as `communicator` does."""
    if isinstance(array, Channels):
        return replace(array, parts=tuple(through_mpi(part) for part in array.parts))
    if isinstance(array, Sample):
        return replace(array, stack=through_mpi(array.stack))
    path, separator, dataset = array.name.partition("::")
    if not isinstance(array, RawArray | ChunkedDataset) or not separator or path != str(array.path):
        return array
    communicator()
    return MpiDataset(array.path, dataset, array.shape, array.dtype, array.chunks, array.spacing_mm)
