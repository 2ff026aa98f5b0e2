"""Small universes, and the smallest study that has every part of the large one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cosmostudy import settings
from cosmostudy.settings import Study
from generate import generate
from meshwright.data.formats import open_array
from universes import Settings

TRAIN, TEST, VOXELS = 4, 3, 32
SMALL = (
    "sizes=[16, 32]",
    "plain=16",
    f"data.train={TRAIN}",
    f"data.test={TEST}",
    f"data.voxels={VOXELS}",
    "data.box_mpc=128",
    "data.workers=1",
    "network.width=1",
    "train.batch=1",
    "train.epochs=2",
)


def make(folder: Path) -> Path:
    """`TRAIN` + `TEST` universes in `folder`; returns it."""
    generate(Settings(count=TRAIN + TEST, voxels=VOXELS, box_mpc=128.0), folder, quiet=True)
    return folder


def whole(folder: Path, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    """The counts of a universe [C, D, H, W], read at once."""
    array = open_array(f"{folder}/universe_{index:05d}.h5::image")
    return array.read([slice(0, size) for size in array.shape])[0]


def small(*more: str) -> Study:
    """The small study, changed by more settings."""
    return settings.load(settings=(*SMALL, *more))


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment(**more: str) -> dict[str, str]:
    """For a process that runs one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}
