"""A universe that is split over ranks is the same to the bit, and each rank holds its share of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cosmoflow_jobs
import numpy as np
import pytest

import generate
import meshwright as mw
from meshwright.data.formats import open_array
from slabs import Slabs
from universes import Settings

# sizes that do not divide, more ranks than layers of chunks, a rank without planes
CASES = [
    Settings(voxels=6, box_mpc=30, assignment="cic"),
    Settings(voxels=36, box_mpc=150, lpt=2, assignment="cic", redshifts=(0.0, 1.5)),
    Settings(voxels=34, box_mpc=100, format="zarr"),
    Settings(voxels=18, box_mpc=60, particles=3, assignment="cic", format="zarr"),
    Settings(voxels=66, box_mpc=200, lpt=2),
]


def image(settings: Settings, folder: Path) -> np.ndarray:
    array = open_array(settings.image(folder, 1))
    return array.read(tuple(slice(0, size) for size in array.shape))[0]


def made(folder: Path) -> Path:
    for number in range(len(CASES)):
        (folder / str(number)).mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made(tmp_path_factory.mktemp("alone"))
    for number, settings in enumerate(CASES):
        generate.make(settings, folder / str(number), 1)
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_files(ranks: int, alone: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "split")
    mw.launch(cosmoflow_jobs.make_all, ranks, (CASES, folder))
    for number, settings in enumerate(CASES):
        wanted, found = (image(settings, where / str(number)) for where in (alone, folder))
        assert wanted.std() > 0.2 * wanted.mean()
        assert np.array_equal(wanted, found), settings


def test_transforms_over_ranks_are_those_of_one_to_the_bit() -> None:
    from fields import gaussian_modes

    slabs = Slabs(30)
    modes = gaussian_modes(slabs, 9, lambda k: k**-1.5, 100.0)
    field = slabs.backward(lambda row: modes[:, row].copy())
    assert np.abs(field - np.fft.irfftn(modes, s=(30, 30, 30), axes=(0, 1, 2))).max() < 1e-12 * np.abs(field).max()
    parts = mw.launch(cosmoflow_jobs.transforms, 4, (30,))  # 8, 8, 8 and 6 planes
    assert np.array_equal(modes, np.concatenate([part for part, _ in parts], axis=1))
    assert np.array_equal(field, np.concatenate([part for _, part in parts], axis=0))


def test_a_rank_of_four_holds_a_quarter(tmp_path: Path) -> None:
    settings = Settings(voxels=96, box_mpc=200, lpt=2, assignment="cic")
    whole = cosmoflow_jobs.peak_bytes(settings, tmp_path)
    parts = mw.launch(cosmoflow_jobs.peak_bytes, 4, (settings, tmp_path))
    print(f"{whole} bytes on one rank, {parts} on four")
    assert whole > 32 * settings.grid**3  # what is measured is the arrays
    assert max(parts) < 1.4 * whole / 4  # gloo's thread may let go of what was sent a moment later


def test_torchrun_splits_over_its_ranks(tmp_path: Path) -> None:
    """The command line under torchrun: no `--ranks` is needed, and one line says that it is done."""
    settings = Settings(count=2, voxels=12, box_mpc=50)
    script = Path(generate.__file__)
    size = ["--count", "2", "--voxels", "12", "--box", "50"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "LOCAL_"))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "split"), *size], capture_output=True, text=True, env=kept, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 universes of 12³ voxels") == 1
    generate.generate(settings, tmp_path / "alone")
    for folder in ("split", "alone"):
        assert len(list((tmp_path / folder).glob("universe_*.h5"))) == 2
    assert np.array_equal(image(settings, tmp_path / "split"), image(settings, tmp_path / "alone"))
