"""Phantoms as files: `images/` and `labels/` of `.npy`, which `meshwright train --set data.path=DIR` reads in parts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from rich.progress import track

from phantom import planes

SLAB = 16  # planes made at once: more volume than that is never in memory


def write(folder: Path, index: int, size: int, seed: int) -> None:
    """Volume `index`; a file has its name only when it is whole, and is not made again."""
    kinds = (("images", np.int16), ("labels", np.uint8))
    paths = [folder / kind / f"phantom_{index:04d}.npy" for kind, _ in kinds]
    if all(path.exists() for path in paths):
        return
    parts = [path.with_name(f".{path.name}.partial") for path in paths]
    arrays = []
    for part, (_, dtype) in zip(parts, kinds, strict=True):
        part.parent.mkdir(parents=True, exist_ok=True)
        arrays.append(np.lib.format.open_memmap(part, "w+", dtype, (size, size, size)))
    for first in range(0, size, SLAB):
        last = min(size, first + SLAB)
        for array, made in zip(arrays, planes(seed, index, size, first, last), strict=True):
            array[first:last] = made
    for array, part, path in zip(arrays, parts, paths, strict=True):
        array.flush()
        os.replace(part, path)


def write_all(folder: Path, count: int, size: int, seed: int = 0) -> Path:
    """`count` volumes in a folder of their own below `folder`, which is returned. Shows its progress."""
    found = folder / f"{size}-seed{seed}"
    for index in track(range(count), f"phantoms of {size} cubed", transient=True):
        write(found, index, size, seed)
    return found
