"""The main job's task: folds that never meet, blocks that no split can change, a part that costs what it must."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright.data.mni as mni
from meshwright.data.mni import MniPart, Template, open_mni
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval

BOX = (slice(1, 12), slice(2, 13), slice(0, 10))


def write(folder: Path, shape: tuple[int, int, int] = (14, 15, 13), **arrays: np.ndarray) -> Path:
    """A small template [D, H, W] of random tissues under the names that nilearn uses."""
    random = np.random.default_rng(5)
    for kind in ("t1", "gm", "wm"):
        array = arrays.get(kind, random.integers(0, 256, shape, dtype=np.uint8))
        nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(folder / mni._FILE.format(kind))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("template"))


def whole(part: MniPart) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in part.shape())


def values(folder: Path, kind: str) -> np.ndarray:
    return np.asarray(nibabel.load(folder / mni._FILE.format(kind)).dataobj).T.astype(np.float64)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_image_and_label_are_what_the_task_says(folder: Path, factor: int) -> None:
    part = MniPart(Template.open(folder), "small", BOX, factor)
    d, h, w = part.shape()
    assert (d, h, w) == (11 // factor, 11 // factor, 10 // factor)
    cut = tuple(slice(box.start, box.start + size * factor) for box, size in zip(BOX, (d, h, w), strict=True))

    def means(kind: str) -> np.ndarray:
        blocks = values(folder, kind)[cut].reshape(d, factor, h, factor, w, factor)
        return blocks.mean(axis=(1, 3, 5))

    read = part.read(0, whole(part))
    image, label = read.image, read.label
    assert (image.shape, label.shape) == ((1, 1, d, h, w), (1, d, h, w))
    assert (image.dtype, label.dtype) == (torch.float32, torch.uint8)
    np.testing.assert_allclose(image[0, 0].numpy(), (means("t1") - 128) / 64, rtol=1e-6)
    grey, white = means("gm") / 255, means("wm") / 255
    expected = np.stack((1 - grey - white, grey, white)).round(9).argmax(0)  # rounded: a tie goes to the first class
    np.testing.assert_array_equal(label[0].numpy(), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), factor=st.sampled_from([1, 2, 3, 4]))
def test_any_part_has_the_bits_of_the_whole(folder: Path, data: st.DataObject, factor: int) -> None:
    part = MniPart(Template.open(folder), "small", BOX, factor)
    read = part.read(0, whole(part))
    image, label = read.image, read.label
    ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in part.shape()]
    spans = tuple(slice(lo, hi) for lo, hi in ends)
    cut = part.read(0, spans)
    part_image, part_label, stats = cut.image, cut.label, cut.stats
    assert torch.equal(part_image, image[(..., *spans)])
    assert torch.equal(part_label, label[(..., *spans)])
    assert stats.part_bytes == stats.ideal_part_bytes == part_label.numel() * 5
    assert stats.ideal_read_bytes == part_label.numel() * factor**3 * 3
    assert stats.read_bytes >= stats.ideal_read_bytes


def test_parts_of_all_ranks_make_the_whole(folder: Path) -> None:
    part = MniPart(Template.open(folder), "small", BOX, 2)
    plan = Plan.uniform(depth=2, height=2, width=2)
    read = part.read(0, whole(part))
    image, label = read.image, read.label
    seen = torch.zeros_like(label)
    for rank in range(plan.ranks):
        spans = interval(part.shape(), plan, rank, layout="DHW")
        cut = part.read(0, spans)
        part_image, part_label = cut.image, cut.label
        assert torch.equal(part_image[0, 0], image[0, 0][spans])
        assert torch.equal(part_label[0], label[0][spans])
        seen[0][spans] += 1
    assert bool((seen == 1).all())


def test_the_first_rank_in_depth_stops_early_and_memory_is_its_part(tmp_path: Path) -> None:
    part = MniPart(Template.open(write(tmp_path, (96, 96, 96))), "large", (slice(0, 96),) * 3, 2)
    upper, lower = (part.read(0, (span, slice(0, 48), slice(0, 48))).stats for span in (slice(0, 24), slice(24, 48)))
    header_bytes = 3 * 352
    assert upper.read_bytes == upper.ideal_read_bytes + header_bytes
    assert lower.read_bytes == 2 * lower.ideal_read_bytes + header_bytes  # what lies in front has to be decoded
    tracemalloc.start()
    stats = part.read(0, (slice(24, 48), slice(0, 48), slice(0, 48))).stats
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stats.peak_bytes == pytest.approx(stats.part_bytes, rel=1)
    assert peak_bytes < stats.peak_bytes + 3 * 2**18  # beside what is counted: buffers of three decoders


def test_a_box_outside_is_refused(folder: Path) -> None:
    part = MniPart(Template.open(folder), "small", BOX, 2)
    with pytest.raises(DataError, match=r"small: the box .* is no part of shape \(5, 5, 5\)"):
        part.read(0, (slice(0, 6), slice(0, 5), slice(0, 5)))


def test_maps_of_another_shape_are_named(tmp_path: Path) -> None:
    write(tmp_path, wm=np.zeros((14, 15, 12), np.uint8))
    with pytest.raises(DataError, match=r"t1_tal.* has shape \(14, 15, 13\) but .*wm_tal.* has \(14, 15, 12\)"):
        Template.open(tmp_path)


def test_without_nilearn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mni.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'meshwright\[examples\]'"):
        open_mni()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 2}, "folds 0 and 1"),
        ({"resolution_mm": 5}, "1, 2, 3 or 4"),
        ({"hemisphere": "right"}, "'both' or 'left'"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_mni(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("crop", [True, False])
def test_training_and_validation_planes_never_meet(fold: int, crop: bool) -> None:
    train, validate = (part.box[1] for part in open_mni(fold, 1, crop=crop))
    first, last = (train, validate) if fold == 0 else (validate, train)
    planes = 233
    assert first.stop <= last.start - 0.08 * planes + 1  # 8 % lie between
    assert (train.stop <= 0.6 * planes) if fold == 0 else (train.start >= 0.4 * planes)
    assert (validate.start >= 0.68 * planes) if fold == 0 else (validate.stop <= 0.32 * planes)


def test_the_box_of_the_brain_leaves_out_no_tissue() -> None:
    for fold in (0, 1):
        for cut, all_planes in zip(open_mni(fold, 4, crop=True), open_mni(fold, 4, crop=False), strict=True):
            for volume in (cut.template.grey, cut.template.white):
                full = all_planes.box
                tissue = np.zeros([span.stop - span.start for span in full], bool)
                for z, plane in enumerate(mni.Planes(volume, full)):
                    tissue[z] = plane > 127  # voxels whose most likely class can be a tissue
                inside = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(cut.box, full, strict=True))
                kept = tissue[inside].sum()
                assert kept == tissue.sum() > 0


def test_the_default_task() -> None:
    train, validate = open_mni()
    assert (train.shape(), validate.shape()) == ((80, 56, 80), (80, 32, 80))
    assert train.spacing_mm() == (2.0, 2.0, 2.0)
    left, _ = open_mni(hemisphere="left")
    assert left.shape() == (80, 56, 40)
    part = left.read(0, whole(left))
    both = train.read(0, whole(train))
    assert torch.equal(part.label, both.label[..., :40])
    assert np.bincount(part.label.flatten()).min() > 10_000  # all three classes are there
