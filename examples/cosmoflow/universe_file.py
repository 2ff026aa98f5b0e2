"""The file of a universe: made under a hidden name, filled slab by slab, and renamed when it is whole.

Zarr: every rank writes its own chunks. HDF5: the ranks open the file one after the other (no MPI-IO is needed).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from meshwright.data import hdf5, zarrs
from meshwright.plan.geometry import Interval
from universes import Settings


class Writer:
    """The file of one universe while it is made; every rank has one, and all call the same methods."""

    def __init__(self, settings: Settings, folder: Path, index: int, rank: int = 0, ranks: int = 1) -> None:
        self.settings, self.index, self.rank, self.ranks = settings, index, rank, ranks
        self.path = settings.path(folder, index)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        if rank == 0:
            self._create()
        self._together()

    def write(self, channel: int, planes: Interval, counts: npt.NDArray[np.int16]) -> None:
        """Write this rank's planes [planes, H, W] of one channel."""
        place = (channel, slice(planes.lo, planes.hi))
        if self.settings.format == "zarr":
            if planes.size:
                zarrs.zarr().open_array(self.partial / "image", mode="r+")[place] = counts
            return
        for turn in range(self.ranks):
            if turn == self.rank and planes.size:
                with hdf5.h5py().File(self.partial, "r+") as file:
                    file["image"][place] = counts
            self._together()

    def finish(self) -> None:
        """Give the file its name."""
        self._together()
        if self.rank == 0:
            self.partial.replace(self.path)

    def _together(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def _create(self) -> None:
        s = self.settings
        chunks = (1, s.chunk, s.chunk, s.chunk)
        about = {"seed": s.seed, "index": self.index, "box_mpc": s.box_mpc, "redshifts": list(s.redshifts)}
        parameters = s.parameters(self.index).array()
        if s.format == "zarr":
            shutil.rmtree(self.partial, ignore_errors=True)
            group = zarrs.zarr().create_group(self.partial, attributes=about)
            group.create_array("image", shape=s.shape, dtype="int16", chunks=chunks, attributes={"unit": s.unit})
            group.create_array("parameters", shape=parameters.shape, dtype="float64", chunks=parameters.shape)
            group["parameters"][:] = parameters
            return
        with hdf5.h5py().File(self.partial, "w") as file:
            file.attrs.update(about)
            image = file.create_dataset(
                "image", s.shape, "int16", chunks=chunks, compression="gzip", compression_opts=1, shuffle=True
            )
            image.attrs["unit"] = s.unit
            file.create_dataset("parameters", data=parameters)
