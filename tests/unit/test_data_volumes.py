"""A user's own files: pairs, classes, intensities that no plan can change, batches, and parts that are kept."""

from __future__ import annotations

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch

from meshwright.data.kept import Kept
from meshwright.data.source import ReadStats, batch_shape, read_batch, widened
from meshwright.data.volumes import Pairs, hold_out, intensity, open_pairs
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval

CLASSES = ("background", "organ", "lesion")
SHAPE = (6, 7, 8)


def write(path: Path, array: np.ndarray) -> None:
    nibabel.Nifti1Image(array.T, np.diag([0.5, 1.0, 2.0, 1.0])).to_filename(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(8)
    for number in range(3):
        image = random.normal(300, 40, SHAPE).astype(np.float32)
        image[:, :2] = 0  # empty space around the body
        write(tmp_path / f"image_{number}.nii.gz", image)
        write(tmp_path / f"label_{number}.nii.gz", random.integers(0, 3, SHAPE, dtype=np.uint8))
    return tmp_path


def pairs(folder: Path, **options: object) -> Pairs:
    return open_pairs(f"{folder}/image_*.nii.gz", f"{folder}/label_*.nii.gz", CLASSES, **options)  # type: ignore[arg-type]


def stored(folder: Path, name: str) -> np.ndarray:
    return np.asarray(nibabel.load(folder / name).dataobj).T


def test_parts_of_all_ranks_make_the_normalised_whole(folder: Path) -> None:
    image = stored(folder, "image_1.nii.gz").astype(np.float64)
    expected = (image - image[image != 0].mean()) / image[image != 0].std()
    plan = Plan.uniform(depth=2, width=3)
    for rank in range(plan.ranks):
        source = pairs(folder)  # each rank opens the files for itself
        spans = interval(SHAPE, plan, rank, layout="DHW")
        part = source.read(1, spans)
        np.testing.assert_allclose(part.image[0, 0].numpy(), expected[spans], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(part.label[0].numpy(), stored(folder, "label_1.nii.gz")[spans])
        whole = source.read(1, tuple(slice(0, size) for size in SHAPE))
        assert torch.equal(part.image, whole.image[(..., *spans)])
        again = source.read(1, spans).stats
        assert part.stats.read_bytes - again.read_bytes == 352 + image.size * 4  # the one pass for mean and spread


def test_given_intensities_need_no_pass(folder: Path) -> None:
    part = pairs(folder, intensity=(300.0, 40.0)).read(0, (slice(0, 2), slice(0, 7), slice(0, 8)))
    np.testing.assert_allclose(
        part.image[0, 0].numpy(), (stored(folder, "image_0.nii.gz")[:2] - 300) / 40, rtol=1e-5, atol=1e-6
    )
    assert part.stats.read_bytes == part.stats.ideal_read_bytes + 2 * 352


def test_the_shape_of_a_source(folder: Path) -> None:
    source = pairs(folder)
    assert source.names == ("image_0.nii.gz", "image_1.nii.gz", "image_2.nii.gz")
    assert (source.classes, source.shape(2), source.spacing_mm(2)) == (CLASSES, SHAPE, (2.0, 1.0, 0.5))


def test_a_label_that_is_no_class_is_named(folder: Path) -> None:
    label = stored(folder, "label_2.nii.gz").copy()
    label[3, 3, 3] = 7
    write(folder / "label_2.nii.gz", label)
    with pytest.raises(
        DataError, match=r"label_2.nii.gz: label value 7; whole numbers from 0 to 2 .* background, organ"
    ):
        pairs(folder).read(2, tuple(slice(0, size) for size in SHAPE))
    write(folder / "label_2.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(DataError, match=r"label value 0\.5"):
        pairs(folder).read(2, tuple(slice(0, size) for size in SHAPE))


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0, "different")]
)
def test_an_image_without_a_usable_spread_is_named(folder: Path, value: float, message: str) -> None:
    write(folder / "image_0.nii.gz", np.full(SHAPE, value, np.float32))
    with pytest.raises(DataError, match=f"image_0.nii.gz: .*{message}"):
        intensity(pairs(folder).pairs[0].image)
    if value != 0:
        given = open_pairs(f"{folder}/image_*", f"{folder}/label_*", CLASSES, (0.0, 1.0))
        with pytest.raises(DataError, match=f"image_0.nii.gz: .*{message}"):
            given.read(0, (slice(0, 1),) * 3)
    with pytest.raises(DataError, match="both numbers must be finite"):
        open_pairs(f"{folder}/image_*", f"{folder}/label_*", CLASSES, (float("nan"), 1.0))


def test_patterns_that_find_nothing_or_not_the_same_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data.labels: no file matches '.*mask_\*'"):
        open_pairs(f"{folder}/image_*", f"{folder}/mask_*", CLASSES)
    (folder / "label_2.nii.gz").unlink()
    with pytest.raises(DataError, match=r"finds 3 files but data.labels .* finds 2"):
        pairs(folder)


def test_an_image_and_label_of_different_shapes_are_named(folder: Path) -> None:
    write(folder / "label_1.nii.gz", np.zeros((6, 7, 9), np.uint8))
    with pytest.raises(DataError, match=r"image_1.nii.gz has shape \(6, 7, 8\) but .*label_1.nii.gz has \(6, 7, 9\)"):
        pairs(folder)


def headed(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    nibabel.Nifti1Image(array.T, affine).to_filename(path)


def test_an_image_and_label_in_other_places_are_named(folder: Path) -> None:
    """Less than a tenth of a voxel apart everywhere, as rounding leaves them, is one grid."""
    label, image = stored(folder, "label_1.nii.gz"), np.diag([0.5, 1.0, 2.0, 1.0])
    for number, by, distance in ((3, 0.04, ""), (3, 0.06, "0.06"), (0, 0.0, ""), (0, 0.02, "0.14"), (2, 0.008, "")):
        affine = image.copy()
        affine[min(number, 2), number] += by  # the origin of z, the size of x, the size of z
        headed(folder / "label_1.nii.gz", label, affine)
        if not distance:
            assert len(pairs(folder).pairs) == 3
            continue
        words = rf"image_1.nii.gz and .*label_1.nii.gz .* are up to {distance} mm apart, with voxels of 2 × 1 × 0.5 mm"
        with pytest.raises(DataError, match=words):
            pairs(folder)
    turned = image.copy()
    turned[:2, :2] = [[0.5 * np.cos(0.2), -np.sin(0.2)], [0.5 * np.sin(0.2), np.cos(0.2)]]
    headed(folder / "label_1.nii.gz", label, turned)  # of the same orientation, RAS, and the same sizes
    with pytest.raises(DataError, match=r"voxels of equal number are up to .* mm apart"):
        pairs(folder)
    bad: list[str] = []
    assert len(pairs(folder, bad=bad).pairs) == 2
    assert "lie in other places" in bad[0]


def test_voxel_sizes_of_other_formats_are_compared(folder: Path) -> None:
    label = stored(folder, "label_1.nii.gz")
    (folder / "label_1.nii.gz").unlink()
    for spacing, fits in (((2.0, 1.0, 0.5), True), ((2.0, 1.0, 0.501), True), ((2.0, 1.0, 0.6), False)):
        with h5py.File(folder / "label_1.h5", "w") as file:
            file["label"] = label
            file["label"].attrs["spacing_mm"] = spacing
        if fits:
            assert len(open_pairs(f"{folder}/image_*", f"{folder}/label_*", CLASSES).pairs) == 3
        else:
            with pytest.raises(
                DataError, match=r"image_1.nii.gz has voxels of .* but .*label_1.h5::label of .* 0\.6\)"
            ):
                open_pairs(f"{folder}/image_*", f"{folder}/label_*", CLASSES)


def test_the_last_pairs_are_held_out(folder: Path) -> None:
    train, validate = hold_out(pairs(folder), 0.2)
    assert (train.names, validate.names) == (("image_0.nii.gz", "image_1.nii.gz"), ("image_2.nii.gz",))
    with pytest.raises(DataError, match=r"1 pair.* leave nothing to train on"):
        hold_out(validate)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match=r"data.held_out = .*: a share of 0 or more"):
            hold_out(pairs(folder), fraction)


def test_a_batch_has_the_samples_and_the_box_of_its_rank(folder: Path) -> None:
    source = pairs(folder)
    indices = (2, 0, 1)
    shape = batch_shape(source, indices)
    assert shape == (3, 1, *SHAPE)
    plan = Plan.uniform(data=2, height=2)
    for rank in range(plan.ranks):
        spans = interval(shape, plan, rank)
        part = read_batch(source, indices, spans)
        for row, index in enumerate(indices[spans[0]]):
            expected = source.read(index, spans[2:])
            assert torch.equal(part.image[row], expected.image[0])
            assert torch.equal(part.label[row], expected.label[0])
        assert part.image.shape == tuple(span.stop - span.start for span in spans)


def test_a_halo_reaches_as_far_as_the_volume_does() -> None:
    spans = (slice(0, 3), slice(3, 6), slice(5, 5))
    assert widened(spans, (8, 7, 5), 2) == (slice(0, 5), slice(1, 7), slice(5, 5))
    assert widened(spans, (8, 7, 5), (0, 1, 9)) == (slice(0, 3), slice(2, 7), slice(5, 5))


def test_a_rank_without_samples_gets_an_empty_part(folder: Path) -> None:
    part = read_batch(pairs(folder), (0,), (slice(1, 1), slice(0, 1), slice(0, 3), slice(0, 7), slice(0, 8)))
    assert (part.image.shape, part.label.shape) == ((0, 1, 3, 7, 8), (0, 3, 7, 8))
    assert part.stats == ReadStats()


def test_samples_of_different_sizes_make_no_batch(folder: Path) -> None:
    for kind in ("image", "label"):
        write(folder / f"{kind}_1.nii.gz", np.ones((6, 7, 9), np.uint8))
    with pytest.raises(DataError, match=r"image_0.nii.gz has shape \(6, 7, 8\) but image_1.nii.gz has \(6, 7, 9\)"):
        batch_shape(pairs(folder), (0, 1))


def test_kept_parts_are_read_once(folder: Path) -> None:
    source = pairs(folder, intensity=(0.0, 1.0))
    kept = Kept(source)
    spans = (slice(0, 3), slice(0, 7), slice(0, 8))
    first = kept.read(0, spans)
    (folder / "image_0.nii.gz").unlink()
    assert kept.read(0, spans).image is first.image
    assert kept.stats == first.stats
    second = kept.read(1, spans)
    assert kept.stats.read_bytes == first.stats.read_bytes + second.stats.read_bytes
    assert kept.stats.peak_bytes == first.stats.part_bytes + second.stats.peak_bytes
    assert (kept.names, kept.classes, kept.shape(0)) == (source.names, source.classes, source.shape(0))
