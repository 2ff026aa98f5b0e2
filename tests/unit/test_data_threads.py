"""Several threads read from one source at once, as the store does: the parts and their cost are those of one thread."""

from __future__ import annotations

import threading
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
from meshwright.data.kept import Kept
from meshwright.data.mni import open_mni
from meshwright.data.source import IMAGE, Part, ReadStats, VolumeSource, read_batch
from meshwright.data.volumes import Pair, Pairs, open_pairs
from meshwright.errors import DataError

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


class Once:
    """Sample i is i everywhere; counts who reads it, and fails for `bad`."""

    names, classes, fields = tuple("abcd"), ("x", "y"), {"image": IMAGE}
    spacing_mm = shape = None

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.reads = bad, list[tuple[int, str]]()

    def read(self, index: int, spans: object) -> Part:
        self.reads.append((index, threading.current_thread().name))
        if index == self.bad:
            raise DataError(f"sample {index} is damaged")
        return Part({"image": torch.full((1, 1, 2, 2, 2), float(index))}, ReadStats(read_bytes=index))


def test_the_parts_of_a_batch_are_read_by_threads_and_once() -> None:
    whole = (slice(0, 4), slice(0, 1), *(slice(0, 2),) * 3)
    for hands in (1, 2, 9):
        source = Once()
        kept = Kept(source, hands)  # type: ignore[arg-type]
        for batch in ((3, 0, 3, 2), (1, 2, 0, 3)):
            part = read_batch(kept, batch, whole)
            assert part.image[:, 0, 0, 0, 0].tolist() == list(batch)
            assert part.stats.read_bytes == sum(batch)
        assert sorted(index for index, _ in source.reads) == [0, 1, 2, 3]
        assert source.reads[-1] == (1, threading.current_thread().name)  # lacking one sample: no thread is worth it
        assert len({thread for _, thread in source.reads}) <= hands


def test_the_parts_of_a_batch_are_read_at_once() -> None:
    """Each hand holds a sample at the same moment, or they would wait here for ever."""
    together, source = threading.Barrier(3, timeout=60), Once()
    read = source.read

    def meeting(index: int, spans: object) -> Part:
        together.wait()
        return read(index, spans)

    source.read = meeting  # type: ignore[method-assign]
    read_batch(Kept(source, 3), (0, 1, 2), (slice(0, 3), slice(0, 1), *(slice(0, 2),) * 3))  # type: ignore[arg-type]
    assert len({thread for _, thread in source.reads}) == 3


@pytest.mark.parametrize("hands", [1, 2])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_batch_lies_where_its_parts_are_kept(
    hands: int, dtype: type, lead: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy for the first batch, the same bits as one by one, and a copy where the parts lie apart."""
    monkeypatch.setattr("meshwright.data.arrays.SLAB_BYTES", 600)
    draw, shape = np.random.default_rng(4), (9, 8, 7)
    for case in range(4):
        np.save(tmp_path / f"{case}_image.npy", (900 * draw.normal(size=(*lead, *shape))).astype(dtype))
        np.save(tmp_path / f"{case}_label.npy", draw.integers(0, 3, shape, dtype=np.uint8))
    source = open_pairs(f"{tmp_path}/*_image.npy", f"{tmp_path}/*_label.npy", ("a", "b", "c"), intensity=(12.0, 700.0))
    kept, spans = Kept(Counted(source), hands), (slice(2, 7), slice(0, 8), slice(1, 7))
    rows = (slice(0, 2), slice(0, 1 if not lead else 2), *spans)
    for batch in ((2, 0), (1, 3)):
        part = read_batch(kept, batch, rows)
        for name in ("image", "label"):
            one = [source.read(index, spans)[name] for index in batch]
            assert torch.equal(part[name], torch.cat(one))
            assert part[name].data_ptr() == kept.read(batch[0], spans)[name].data_ptr()
        assert (
            part.stats.read_bytes
            == part.stats.ideal_read_bytes
            == sum(source.read(index, spans).stats.ideal_read_bytes for index in batch)
        )
    mixed = read_batch(kept, (0, 1), rows)
    assert torch.equal(mixed.image, torch.cat([source.read(index, spans).image for index in (0, 1)]))
    assert mixed.image.data_ptr() != kept.read(0, spans).image.data_ptr()


def test_a_part_that_cannot_be_read_takes_no_room_beside_the_others(tmp_path: Path) -> None:
    shape, box = (40, 64, 64), (slice(0, 40), slice(0, 64), slice(0, 64))
    for case in range(3):
        np.save(tmp_path / f"{case}_image.npy", np.full(shape, case, np.int16))
        np.save(tmp_path / f"{case}_label.npy", np.full(shape, 9 if case == 1 else 1, np.uint8))
    source = open_pairs(f"{tmp_path}/*_image.npy", f"{tmp_path}/*_label.npy", ("a", "b"), intensity=(0.0, 1.0))
    kept = Kept(source, 2)
    with pytest.raises(DataError, match=r"1_label.npy: label value 9"):
        read_batch(kept, (0, 1, 2), (slice(0, 3), slice(0, 1), *box))
    for case in (0, 2):
        part = kept.read(case, box)
        assert part.image.unique().tolist() == [case]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in part.values()}
        assert sum(held.values()) == part.stats.part_bytes


def test_a_sample_that_no_thread_can_read_is_an_error_of_the_caller() -> None:
    source = Once(bad=2)
    kept = Kept(source, 4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample 2 is damaged"):
        read_batch(kept, (0, 2, 1), (slice(0, 3), slice(0, 1), *(slice(0, 2),) * 3))
    assert source.reads[-1] == (2, threading.current_thread().name)
    source.bad = None
    assert read_batch(kept, (0, 2, 1), (slice(0, 3), slice(0, 1), *(slice(0, 2),) * 3)).image.shape[0] == 3
    assert sorted(index for index, _ in source.reads) == [0, 1, 2, 2, 2]


def test_the_template_is_read_by_two_threads() -> None:
    source = open_mni(resolution_mm=4)[0]
    box = (slice(0, 2), slice(3, 9), slice(0, 7))
    expected = source.read(0, box)
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(lambda _: source.read(0, box), range(2)):
            assert torch.equal(part.image, expected.image)
            assert torch.equal(part.label, expected.label)
