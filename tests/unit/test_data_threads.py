"""Several threads read from one source at once, as the store does: the parts and their cost are those of one thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
import zarr

from meshwright.data.counted import Counted
from meshwright.data.formats import open_array
from meshwright.data.mni import open_mni
from meshwright.data.source import ReadStats, VolumeSource
from meshwright.data.volumes import Pair, Pairs

SHAPE, SAMPLES, THREADS, ROUNDS = (12, 20, 18), 4, 8, 6
BOXES = (
    (slice(0, 6), slice(0, 20), slice(0, 18)),
    (slice(5, 12), slice(3, 17), slice(2, 9)),
    (slice(0, 12), slice(0, 20), slice(0, 18)),
)


def written(folder: Path, kind: str, name: str, array: np.ndarray) -> str:
    """Where `open_array` finds `array`."""
    match kind:
        case "npy":
            np.save(folder / f"{name}.npy", array)
        case "nii" | "nii.gz":
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), folder / f"{name}.{kind}")
        case "zarr":
            zarr.create_array(folder / f"{name}.zarr", data=array, chunks=(5, 8, 18), shards=(10, 16, 18))
        case _:  # all in one file
            with h5py.File(folder / "all.h5", "a") as file:
                options = {"chunks": (5, 8, 18), "compression": "gzip"} if kind == "h5 chunked" else {}
                file.create_dataset(name, data=array, **options)
            return f"{folder / 'all.h5'}::{name}"
    return str(folder / f"{name}.{kind}")


@pytest.fixture(params=["npy", "nii", "nii.gz", "zarr", "h5 chunked", "h5"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[tuple[str, str]]:
    random = np.random.default_rng(0)
    found = []
    for sample in range(SAMPLES):
        image = random.integers(-900, 900, SHAPE, dtype=np.int16)
        label = (image > 0).astype(np.uint8)
        kind = str(request.param)
        found.append(
            (written(tmp_path, kind, f"image{sample}", image), written(tmp_path, kind, f"label{sample}", label))
        )
    return found


def pairs(files: list[tuple[str, str]]) -> Pairs:
    return Pairs(tuple(Pair(open_array(image), open_array(label)) for image, label in files), ("dark", "bright"))


def assert_as_one_thread(shared: VolumeSource, alone: VolumeSource, boxes: tuple[tuple[slice, ...], ...]) -> None:
    """Each thread reads another sample at a time: a store never asks twice for the same at once."""
    counted = Counted(shared)
    samples = range(len(shared.names))
    for sample in samples:  # intensities are measured once
        alone.read(sample, boxes[0]), counted.read(sample, boxes[0])
    counted.take()
    expected = {(sample, at): alone.read(sample, box) for sample in samples for at, box in enumerate(boxes)}
    jobs = [key for _ in range(ROUNDS) for key in expected]
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(lambda key: counted.read(key[0], boxes[key[1]]), jobs))
    for key, part in zip(jobs, parts, strict=True):
        assert torch.equal(part.image, expected[key].image)
        assert torch.equal(part.label, expected[key].label)
    read = counted.take()
    once = sum((part.stats for part in expected.values()), ReadStats())
    assert (read.read_bytes, read.part_bytes) == (ROUNDS * once.read_bytes, ROUNDS * once.part_bytes)


def test_every_format_is_read_by_many_threads(files: list[tuple[str, str]]) -> None:
    assert_as_one_thread(pairs(files), pairs(files), BOXES)


def test_intensities_are_measured_by_many_threads(files: list[tuple[str, str]]) -> None:
    one = pairs(files)
    expected = [one.read(sample, BOXES[1]).image for sample in range(SAMPLES)]
    many = pairs(files)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda sample: many.read(sample, BOXES[1]).image, range(SAMPLES)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_template_is_read_by_two_threads() -> None:
    source = open_mni(resolution_mm=4)[0]
    box = (slice(0, 2), slice(3, 9), slice(0, 7))
    expected = source.read(0, box)
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(lambda _: source.read(0, box), range(2)):
            assert torch.equal(part.image, expected.image)
            assert torch.equal(part.label, expected.label)
