"""HDF5 through MPI-IO: the same parts, or an error that names what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from field_jobs import COUNT, LAYOUTS, SHAPE, expected, hdf5_files, hdf5_stack, serve_fields_through_mpi
from meshwright import config
from meshwright.cluster.launch import launch
from meshwright.data.fields import open_fields
from meshwright.data.formats import open_array
from meshwright.data.hdf5_mpi import MpiDataset, communicator, through_mpi
from meshwright.errors import DataError
from meshwright.train.job import sources
from training_jobs import job, losses, train

needs_mpi = pytest.mark.skipif(not h5py.get_config().mpi, reason="h5py is not built with MPI")


@needs_mpi
def test_parts_through_mpi_are_those_of_the_whole(tmp_path: Path) -> None:
    for path in hdf5_files(tmp_path), hdf5_stack(tmp_path / "all") if (tmp_path / "all").mkdir() is None else tmp_path:
        source = open_fields(path, LAYOUTS, hdf5_driver="mpio")
        assert len(source.names) == COUNT
        box = (slice(1, 5), slice(0, 6), slice(2, 4))
        for index in range(COUNT):
            part = source.read(index, box)
            for name, field in source.fields.items():
                want = expected(index)[name]
                np.testing.assert_array_equal(part[name][0].numpy(), want[(..., *box)] if field.is_volume else want)


@needs_mpi
def test_ranks_read_through_mpi_in_threads(tmp_path: Path) -> None:
    launch(serve_fields_through_mpi, 2, (str(hdf5_files(tmp_path)), {"depth": 2}), threads=1)


@needs_mpi
def test_training_through_mpi_has_the_bits_of_training_without(tmp_path: Path) -> None:
    settings = pairs(tmp_path / "data")
    train(job(settings, ranks=2), tmp_path / "plain")
    for more in (), ("data.memory_mib=1",):
        train(job(settings, "data.hdf5_driver=mpio", *more, ranks=2), tmp_path / f"mpi{len(more)}")
        assert losses(tmp_path / f"mpi{len(more)}") == losses(tmp_path / "plain")


def pairs(folder: Path) -> list[str]:
    folder.mkdir()
    random = np.random.default_rng(2)
    for case in range(4):
        image = random.normal(size=(12, 8, 8)).astype(np.float32)
        with h5py.File(folder / f"{case}.h5", "w") as file:
            file.create_dataset("image", data=image, chunks=(6, 8, 8), compression="gzip")
            file["label"] = (image > 0.5).astype(np.uint8)  # contiguous
    return [
        *(f"data.path={folder}", "data.classes=[dark, bright]", "data.intensity=[0, 1]", "train.steps=4"),
        *("model.base=4", "model.levels=2", "train.validate_every=0", "threads=1"),
    ]


def test_only_hdf5_goes_through_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.data.hdf5_mpi.communicator", lambda: None)
    np.save(tmp_path / "a.npy", np.zeros(SHAPE))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plain"] = np.zeros(SHAPE)
    plain, mpi = open_array(tmp_path / "a.npy"), through_mpi(open_array(tmp_path / "a.h5"))
    assert through_mpi(plain) is plain
    assert isinstance(mpi, MpiDataset)
    assert (mpi.name, mpi.shape, mpi.chunks) == (f"{tmp_path}/a.h5::plain", SHAPE, None)


def test_ranks_that_mpi_has_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "meshwright.data.hdf5_mpi.h5py", lambda: SimpleNamespace(get_config=lambda: SimpleNamespace(mpi=True))
    )
    monkeypatch.setenv("PMIX_RANK", "0")
    with pytest.raises(DataError, match=r"these ranks were started by MPI \(PMIX_RANK is set\)"):
        communicator()


@pytest.mark.skipif(h5py.get_config().mpi, reason="h5py is built with MPI")
def test_what_is_missing_for_mpi_is_named(tmp_path: Path) -> None:
    settings = config.load(None, [*pairs(tmp_path / "data"), "data.hdf5_driver=mpio"])
    with pytest.raises(DataError, match=r"data.hdf5_driver = mpio: this h5py is built without MPI .* HDF5_MPI=ON"):
        sources(settings)
    with pytest.raises(DataError, match="built without MPI"):
        open_fields(hdf5_files(tmp_path), LAYOUTS, hdf5_driver="mpio")
