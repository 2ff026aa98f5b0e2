"""`loaders`: samples a second of the same batches from torch's `DataLoader`, MONAI's `CacheDataset`, and from here.

All read the same int16 images and uint8 labels, cast and scale the images to float32, and give each rank its part of
the same batches in the same order, in memory of its own. With two ranks a sample is split in depth: the others load
whole samples on both ranks and take the part (that is what they can do), `read_batch` and `Store` read it. The first
epoch begins with names of files and ends with its last batch: opening, worker processes and filling a cache are in it.

- `DataLoader`: 0 or 2 worker processes, which stay (`persistent_workers`). Nothing is pinned, there is no GPU.
- `CacheDataset`: no random transform, so everything is cached; as many threads fill it as the rank has cores, tensors
  without MONAI's metadata (`EnsureTyped(track_meta=False)`). Once with `DataLoader(num_workers=0)`, once with
  `ThreadDataLoader`, which its documents advise for cached data.

Every contender runs once in each round, in a fresh random order, the slower rank counts; figures are medians of paired
ratios with a bootstrap interval.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.distributed as dist
from io_contenders import CONTENDERS, LATER, MONAIS, SAMPLES, SIZE, Batch, Work
from io_pages import forget, said
from spatial import barrier, ratio

import meshwright as mw

ENDINGS = (".npy", ".nii.gz")
OURS = ("Store", "Kept")


def write_samples(folder: Path, edge: int) -> None:
    draw = np.random.default_rng(0)
    for i in range(SAMPLES):
        smooth = np.linspace(-900, 900, edge)[:, None, None]
        image = (smooth + draw.normal(0, 30, (edge,) * 3)).astype(np.int16)
        label = np.repeat(draw.integers(0, 3, (edge, 1, 1), np.uint8), edge * edge).reshape(image.shape)
        for name, values in (("image", image), ("label", label)):
            np.save(folder / f"{i:03d}-{name}.npy", values)
            nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), folder / f"{i:03d}-{name}.nii.gz")


def fresh(folder: str) -> bool:
    """Files that nobody has read: out of the page cache, and changed, so that no copy of a stream is theirs."""
    cold = False
    barrier()
    if dist.get_rank() == 0:
        for file in sorted(Path(folder).iterdir()):
            os.utime(file)
        cold = forget(folder)
    barrier()
    return cold


def timed(make: Callable[[Work], Iterator[Batch]], work: Work) -> tuple[float, float]:
    """Seconds of the first epoch, and of one of the later ones."""
    barrier()
    begin_s = time.perf_counter()
    batches = make(work)
    for _ in range(work.epoch):
        next(batches)
    barrier()
    middle_s = time.perf_counter()
    for _ in range(LATER * work.epoch):
        next(batches)
    barrier()
    end_s = time.perf_counter()
    batches.close()  # type: ignore[attr-defined]
    return middle_s - begin_s, (end_s - middle_s) / LATER


def see_equal(names: list[str], work: Work) -> None:
    """Raise `AssertionError` unless all contenders give the same first batch; loads their modules, too."""
    first: Batch | None = None
    for name in names:
        batches = CONTENDERS[name](work)
        batch = next(batches)
        batches.close()  # type: ignore[attr-defined]
        first = first or batch
        for field in ("image", "label"):
            torch.testing.assert_close(batch[field], first[field], msg=lambda said, name=name: f"{name}: {said}")


def race(folder: str, names: list[str], rounds: int) -> tuple[dict[str, dict[str, list[tuple[float, float]]]], bool]:
    """Runs on each rank: ending → contender → (first, later) of each round; and whether the page cache was emptied."""
    torch.set_num_threads(1)
    ranks, cold = dist.get_world_size(), True
    plan = mw.Plan.uniform(depth=ranks) if ranks > 1 else mw.Plan.uniform()
    seconds: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for ending in ENDINGS:
        work, order = Work(folder, ending, plan, dist.get_rank()), random.Random(0)
        see_equal(names, work)
        seconds[ending] = {name: [] for name in names}
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                cold &= fresh(folder) or dist.get_rank() > 0
                seconds[ending][name].append(timed(CONTENDERS[name], work))
    return seconds, cold


def loaders(folder: str, edge: int, rounds: int) -> dict[str, float]:
    """Print the tables; returns samples a second here ÷ there: "2 ranks, .npy, Store / MONAI CacheDataset: later"."""
    names = list(CONTENDERS)
    print(f"\nloaders: {SAMPLES} samples, int16, edge {edge}, batches of {SIZE}, {rounds} rounds")
    if importlib.util.find_spec("monai") is None:
        names = [name for name in names if name not in MONAIS]
        print("  MONAI: skipped, it is not installed here; it comes with pip install 'meshwright[test]'")
    write_samples(Path(folder), edge)
    figures: dict[str, float] = {}
    for ranks in (1, 2):
        found = mw.launch(race, ranks, (folder, names, rounds), threads=1)
        for ending in ENDINGS:
            slowest = {
                name: [tuple(map(max, zip(*turn, strict=True))) for turn in zip(*of, strict=True)]
                for name in names
                for of in [[seconds[ending][name] for seconds, _ in found]]
            }
            print(f"\n  {ending}, {ranks} rank(s); first epoch: {said(found[0][1])}; later: as the first left it")
            print(f"  {'samples a second':36s}{'first epoch':>24s}{'later epochs':>24s}")
            for name in names:
                rates = [SAMPLES / sorted(turn[when] for turn in slowest[name])[rounds // 2] for when in (0, 1)]
                print(f"  {name:36s}{rates[0]:24.1f}{rates[1]:24.1f}")
            for ours in OURS:
                for name in (name for name in names if name not in OURS):
                    cells = ""
                    for when, label in enumerate(("first", "later")):
                        theirs, here = ([turn[when] for turn in slowest[who]] for who in (name, ours))
                        middle, low, high = ratio(theirs, here)
                        figures[f"loaders {ranks} rank(s), {ending}, {ours} / {name}: {label}"] = middle
                        cells += f"{f'{middle:.2f} [{low:.2f}, {high:.2f}]':>24s}"
                    print(f"  {f'{ours} / {name}':36s}{cells}")
    return figures
