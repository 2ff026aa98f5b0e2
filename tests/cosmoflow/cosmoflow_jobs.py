"""What other processes do in these tests: ranks that make universes together, processes that are killed."""

from __future__ import annotations

import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import torch.distributed as dist

import generate
from fields import gaussian_modes
from slabs import Slabs
from universe_file import Writer
from universes import Settings


def make_all(settings: list[Settings], folder: Path) -> None:
    """Universe 1 of each of the settings, in a folder of its own, by all ranks together."""
    for number, one in enumerate(settings):
        generate.make(one, folder / str(number), 1, dist.get_rank(), dist.get_world_size())


def transforms(size: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's part of a field in wave numbers, and in space."""
    slabs = Slabs(size, dist.get_rank(), dist.get_world_size())
    modes = gaussian_modes(slabs, 9, lambda k: k**-1.5, 100.0)
    return modes, slabs.backward(lambda row: modes[:, row].copy())


def peak_bytes(settings: Settings, folder: Path) -> int:
    """The most that numpy held at one time on this rank while a universe was made."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generate.make(Settings(voxels=16), folder, 0, rank, ranks)  # imports, groups, tables
    tracemalloc.start()
    generate.make(settings, folder, 1, rank, ranks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def killed_at(index: int, settings: Settings, out: Path) -> None:
    """Make universes until `index` is written but not finished, and die there."""
    finish = Writer.finish

    def die(writer: Writer) -> None:
        if writer.index == index:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(writer)

    Writer.finish = die
    generate.generate(settings, out)


def dies(*args: object) -> int:
    """In place of `generate.make`."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
