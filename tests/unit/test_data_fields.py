"""Fields of any kind from files: each rank gets its box of volumes, the whole of vectors, in the types asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch

from field_jobs import COUNT, FOLDERS, LAYOUTS, ON_DISK, SHAPE, expected, hdf5_files, npy_endings, opened, serve_fields
from meshwright.cluster.launch import launch
from meshwright.data.augmented import Augmented
from meshwright.data.fields import Stored, open_fields
from meshwright.data.kept import Kept
from meshwright.data.rearrange import Flip
from meshwright.data.source import Field, batch_shape, read_batch
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval

WHOLE = tuple(slice(0, size) for size in SHAPE)


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_layout_gives_the_fields_of_the_whole_cut(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    source = opened(layout(tmp_path))
    assert len(set(source.names)) == len(source.names) == COUNT
    assert source.fields["image"] == Field("CDHW", (2,), torch.float32)
    assert source.fields["cube"] == Field("KLM", SHAPE, torch.int32)
    assert (source.fields["age"].layout, source.classes) == ("", ("a", "b", "c"))
    plan, indices = Plan.uniform(data=2, depth=3, width=2), (4, 0, 2)
    shape = batch_shape(source, indices)
    assert shape == (3, 2, *SHAPE)
    for rank in range(plan.ranks):
        spans = interval(shape, plan, rank)
        part = read_batch(source, indices, spans)
        assert set(part) == set(LAYOUTS)
        for name, field in source.fields.items():
            for row, index in enumerate(indices[spans[0]]):
                want = expected(index)[name]
                want = want[(..., *spans[2:])] if field.is_volume else want
                assert part[name].dtype == field.dtype
                np.testing.assert_array_equal(part[name][row].numpy(), want, err_msg=f"{name} {rank}")
        if "npy" in layout.__name__ and spans[0].stop > spans[0].start:  # exactly the bytes of the part
            assert part.stats.read_bytes == part.stats.ideal_read_bytes


def test_a_rank_without_samples_has_empty_fields(tmp_path: Path) -> None:
    source = opened(hdf5_files(tmp_path))
    part = read_batch(source, [0], (slice(1, 1), slice(0, 2), *WHOLE))
    assert {name: tuple(value.shape) for name, value in part.items()}["matrix"] == (0, 2, 3)
    assert part["age"].shape == (0,)


def test_augmentation_leaves_what_is_no_volume(tmp_path: Path) -> None:
    """`cube` has as many dims as the volume, and even its sizes: its layout says that it is none."""
    source = Kept(opened(npy_endings(tmp_path)))
    part = Augmented(source, [3], [Flip(("depth", "width"))]).read(0, WHOLE)
    want = expected(3)
    for name in ("parameters", "matrix", "cube", "age"):
        np.testing.assert_array_equal(part[name][0].numpy(), want[name])
    for name in ("image", "label", "flow"):
        np.testing.assert_array_equal(part[name][0].numpy(), np.flip(want[name], (-3, -1)))


@pytest.mark.parametrize("axes", [{"data": 2}, {"depth": 2}])
def test_the_store_carries_all_fields(axes: dict[str, int], tmp_path: Path) -> None:
    path = str(hdf5_files(tmp_path))
    for augment, budget, spill in ((False, 1 << 30, None), (False, 32 << 10, str(tmp_path)), (True, 1 << 30, None)):
        sent = launch(serve_fields, 2, (path, axes, augment, budget, spill), threads=1)
        assert (sum(sent) > 0) == (augment or "data" in axes)


def test_what_is_cast_is_rounded_once_and_never_wraps(tmp_path: Path) -> None:
    image = np.array([[[16777217, 3]]], np.int64)  # the first is no float32
    np.save(tmp_path / "image.npy", image)
    for dtype, want in ((torch.float64, 16777217), (torch.float32, 16777216), (torch.int32, 16777217)):
        part = open_fields(tmp_path, {"image": Stored("DHW", dtype=dtype)}).read(0, (slice(0, 1),) * 2 + (slice(0, 2),))
        assert part["image"][0, 0, 0, 0].tolist() == [want, 3]
    thirds = open_fields(tmp_path, {"image": Stored("DHW", scale=1 / 3, shift=0.1)}).read(0, (slice(0, 1),) * 3)
    assert thirds["image"].item() == np.float32(16777217 / 3 + 0.1)
    for dtype in (torch.int16, torch.uint8):
        with pytest.raises(DataError, match=r"image.npy: values from 16777217 to 16777217; whole numbers from .* to"):
            open_fields(tmp_path, {"image": Stored("DHW", dtype=dtype)}).read(0, (slice(0, 1),) * 3)
    np.save(tmp_path / "image.npy", np.array([[[0.5]]]))
    with pytest.raises(DataError, match=r"values from 0.5 to 0.5; whole numbers"):
        open_fields(tmp_path, {"image": Stored("DHW", dtype=torch.int16)}).read(0, (slice(0, 1),) * 3)
    np.save(tmp_path / "image.npy", np.array([[[np.nan]]]))
    with pytest.raises(DataError, match="NaN or infinity"):
        open_fields(tmp_path, {"image": "DHW"}).read(0, (slice(0, 1),) * 3)


def test_nifti_with_vectors_beside_it(tmp_path: Path) -> None:
    """The scale of the file and the one that was asked for are both applied; x, y, z are W, H, D."""
    stored = ON_DISK[0]["t1"]
    image = nibabel.Nifti1Image(stored.T, np.diag([0.5, 1.0, 2.0, 1.0]))
    image.header.set_slope_inter(0.5, 7.0)
    image.to_filename(tmp_path / "a_image.nii.gz")
    np.save(tmp_path / "a_parameters.npy", ON_DISK[0]["parameters"])
    source = open_fields(tmp_path, {"image": Stored("DHW", scale=2.0), "parameters": "K"})
    assert (source.names, source.spacing_mm(0)) == (("a",), (2.0, 1.0, 0.5))
    box = (slice(1, 5), slice(0, 6), slice(2, 4))
    part = source.read(0, box)
    scaled = np.asarray(nibabel.load(tmp_path / "a_image.nii.gz").dataobj).T[box].astype(np.float32) * 2
    np.testing.assert_array_equal(part["image"][0, 0].numpy(), scaled)
    np.testing.assert_array_equal(part["parameters"][0].numpy(), ON_DISK[0]["parameters"].astype(np.float32))


def test_labels_that_are_no_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0.h5::label: label value 2; whole numbers from 0 to 1 .* classes a, b"):
        open_fields(hdf5_files(tmp_path), LAYOUTS, ("a", "b")).read(0, WHOLE)


def test_what_does_not_fit_is_named_or_left_out(tmp_path: Path) -> None:
    hdf5_files(tmp_path)
    names = {"image": Stored("DHW", ("t1",)), "parameters": "K"}
    with h5py.File(tmp_path / "5.h5", "w") as file:
        file["t1"] = ON_DISK[0]["t1"]
    with h5py.File(tmp_path / "6.h5", "w") as file:
        file["t1"], file["parameters"] = ON_DISK[0]["t1"], np.zeros(5)
    with h5py.File(tmp_path / "7.h5", "w") as file:
        file["t1"], file["parameters"] = ON_DISK[0]["t1"][0, 0], np.zeros(4)
    (tmp_path / "8.h5").write_bytes(b"cut off")
    reasons = (
        r"5.h5: there is no dataset 'parameters'; it has: t1",
        r"7.h5::t1: an array of shape \(5,\); at least the dims D, H, W are expected",
        r"8.h5: not an HDF5 file, or truncated",
        r"0.h5::parameters has shape \(4,\) but .*6.h5::parameters has \(5,\) \(K\): all samples need one size",
    )
    bad: list[str] = []
    assert len(open_fields(tmp_path, names, bad=bad).names) == COUNT
    for reason, text in zip(reasons, bad, strict=True):
        with pytest.raises(DataError, match=reason):
            raise DataError(text)
    with pytest.raises(DataError, match=reasons[0]):
        open_fields(tmp_path, names)


def test_volumes_of_one_sample_lie_on_one_grid(tmp_path: Path) -> None:
    np.save(tmp_path / "a_image.npy", np.zeros((4, 3, 2)))
    np.save(tmp_path / "a_mask.npy", np.zeros((4, 2, 3)))
    with pytest.raises(DataError, match=r"a_image.npy has shape \(4, 3, 2\) but .*a_mask.npy has \(4, 2, 3\)"):
        open_fields(tmp_path, {"image": "DHW", "mask": "DHW"})


def test_stacks_have_one_length_in_all_fields(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.zeros((2, 4, 3, 2)))
    np.save(tmp_path / "age.npy", np.zeros(3))
    with pytest.raises(
        DataError, match=r"image.npy \(2, 4, 3, 2\), .*age.npy \(3,\): some are stacks .* not all of one"
    ):
        open_fields(tmp_path, {"image": "DHW", "age": ""})
    with pytest.raises(DataError, match=r"some are stacks"):
        open_fields(tmp_path, {"image": "DHW", "age": "K"})
    (tmp_path / "age.npy").unlink()
    np.save(tmp_path / "matrix.npy", np.zeros((2, 4, 3, 2)))
    with pytest.raises(
        DataError, match=r"has shape \(2, 4, 3, 2\); 2 dims are expected by its layout, or 3 in a stack"
    ):
        open_fields(tmp_path, {"image": "DHW", "matrix": "KL"})


def test_what_is_missing_or_ambiguous_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        open_fields(tmp_path / "nowhere", LAYOUTS)
    with pytest.raises(
        DataError, match=r"no samples found. Known are HDF5 files and Zarr groups with datasets t1, t2,"
    ):
        opened(tmp_path)
    npy_endings(tmp_path)
    (tmp_path / "case2_age.npy").unlink()
    with pytest.raises(DataError, match=r"case2_t1.npy: there is no age of this name"):
        opened(tmp_path)
    hdf5_files(tmp_path)
    with pytest.raises(
        DataError, match=r"samples of several kinds, 5 as \*_t1 \+ .* and 5 as datasets; it is not clear"
    ):
        opened(tmp_path)


def test_layouts_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for layout, words in (("DHWC", "together at the end"), ("CDH", "together at the end"), ("KK", "each letter once")):
        with pytest.raises(ValueError, match=words):
            Stored(layout)
    with pytest.raises(ValueError, match="their layout is 'DHW', not 'K'"):
        Stored("K", ("a", "b"))
    with pytest.raises(ValueError, match=r"finite numbers, and none for whole torch\.int16"):
        Stored("K", dtype=torch.int16, scale=0.5)
    with pytest.raises(ValueError, match=r"choose from torch\.float32"):
        Stored("K", dtype=torch.complex64)
    with pytest.raises(ValueError, match="a field 'image' of layout"):
        open_fields(tmp_path, {"image": "KL"})
    with pytest.raises(ValueError, match="are not all different"):
        open_fields(tmp_path, {"image": "DHW", "mask": Stored("DHW", ("image",))})
