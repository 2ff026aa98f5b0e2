"""A box read from a file has the bits of the same box of the whole; what is damaged is named."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import retry
from meshwright.data.nifti import open_volume, see_matching
from meshwright.data.planes import NiftiArray, Planes, read_box
from meshwright.errors import DataError

SHAPE = (7, 6, 9)  # D, H, W


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None, slope: float = 1, inter: float = 0) -> Path:
    """`array` [D, H, W] as a NIfTI file whose stored numbers are exactly those of the array."""
    image = nibabel.Nifti1Image(array.T, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nifti")


def random_box(size: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: slice(*sorted(ends)))


boxes = st.tuples(*(random_box(size) for size in SHAPE))


@pytest.fixture(scope="module", params=["plain.nii", "packed.nii.gz"])
def scaled(request: pytest.FixtureRequest, folder: Path) -> Path:
    stored = np.random.default_rng(0).integers(-3000, 3000, SHAPE, dtype=np.int16)
    return write(folder / request.param, stored, slope=0.125, inter=-7.5)


@settings(max_examples=60, deadline=None)
@given(spans=boxes)
def test_any_box_is_the_slice_of_the_whole(scaled: Path, spans: tuple[slice, slice, slice]) -> None:
    whole = np.asarray(nibabel.load(scaled).dataobj).T.astype(np.float32)
    volume = open_volume(scaled)
    box, decoded_bytes = read_box(volume, spans)
    assert box.dtype == np.float32
    np.testing.assert_array_equal(box, whole[spans])
    if box.size == 0:
        assert decoded_bytes == 0
    elif volume.compressed:  # the stream, up to the last row that is needed
        rows = (spans[0].stop - 1) * SHAPE[1] + spans[1].stop
        assert decoded_bytes == volume.offset_bytes + rows * SHAPE[2] * 2
    else:  # the voxels that are needed
        assert decoded_bytes == box.size * 2


def test_the_header_is_in_the_order_of_the_tensor(scaled: Path) -> None:
    volume = open_volume(scaled)
    assert (volume.shape, volume.spacing_mm, volume.orientation) == (SHAPE, (3.0, 2.0, 1.0), "RAS")
    assert (volume.slope, volume.inter, volume.data_bytes) == (0.125, -7.5, 7 * 6 * 9 * 2)


@pytest.mark.parametrize("dtype", ["u1", ">i2", "<i4", "<u2", ">f4", "<f8"])
def test_every_number_type_and_byte_order(folder: Path, dtype: str) -> None:
    stored = np.random.default_rng(1).integers(0, 200, SHAPE).astype(dtype)
    image = nibabel.Nifti1Image(stored.T, np.eye(4), nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"))
    image.header.set_data_dtype(np.dtype(dtype))
    path = folder / f"type_{dtype[1:]}.nii.gz"
    image.to_filename(path)
    box, _ = read_box(open_volume(path), (slice(2, 5), slice(1, 6), slice(0, 4)))
    np.testing.assert_array_equal(box, stored[2:5, 1:6, 0:4].astype(np.float32))


def test_memory_is_the_box_and_one_plane_not_the_volume(folder: Path) -> None:
    path = write(folder / "large.nii.gz", np.zeros((160, 128, 128), np.int16))  # 5.2 MB of numbers
    volume = open_volume(path)
    tracemalloc.start()
    box, _ = read_box(volume, (slice(150, 160), slice(0, 64), slice(0, 64)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < box.nbytes + 2**19 + 4 * 128 * 128 * 2  # the box, the stream's buffers, a few planes


def test_a_box_outside_is_refused(scaled: Path) -> None:
    with pytest.raises(DataError, match=r"no part of shape \(7, 6, 9\)"):
        Planes(open_volume(scaled), (slice(0, 8), slice(0, 6), slice(0, 9)))


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.nii: no such file"):
        open_volume(folder / "absent.nii")


@pytest.mark.parametrize("content", [b"", b"not a volume " * 100])
def test_a_file_of_another_kind_is_named(folder: Path, content: bytes) -> None:
    for name, data in (
        ("other.nii", content),
        ("other.nii.gz", gzip.compress(content)),
        ("cut.nii.gz", b"\x1f\x8b\x08"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            open_volume(folder / name)


def test_what_lies_behind_x_y_z_are_channels_but_only_one_such_dim(folder: Path) -> None:
    stored = np.random.default_rng(4).integers(0, 255, (2, 5, 4, 3), dtype=np.uint8)  # C, D, H, W
    for name in ("four.nii", "four.nii.gz"):
        nibabel.Nifti1Image(stored.T, np.eye(4)).to_filename(folder / name)
        array = NiftiArray(open_volume(folder / name))
        assert array.shape == stored.shape
        spans = (slice(0, 2), slice(1, 4), slice(2, 4), slice(0, 2))
        np.testing.assert_array_equal(array.read(spans)[0], stored[spans])
    nibabel.Nifti1Image(np.zeros((3, 4, 5, 2, 2), np.uint8), np.eye(4)).to_filename(folder / "five.nii")
    with pytest.raises(DataError, match=r"five.nii: a 5-D volume of shape \(3, 4, 5, 2, 2\)"):
        open_volume(folder / "five.nii")
    nibabel.Nifti1Image(np.zeros((3, 4, 5, 1), np.uint8), np.eye(4)).to_filename(folder / "single.nii")
    assert NiftiArray(open_volume(folder / "single.nii")).shape == (5, 4, 3)


def test_a_truncated_plain_file_shows_expected_and_found_bytes(scaled: Path, tmp_path: Path) -> None:
    data = scaled.read_bytes()
    if scaled.suffix == ".gz":
        data = gzip.decompress(data)
    (tmp_path / "cut.nii").write_bytes(data[:-10])
    with pytest.raises(
        DataError, match=rf"cut.nii: truncated or damaged: {len(data)} bytes expected, {len(data) - 10} "
    ):
        open_volume(tmp_path / "cut.nii")


def test_a_truncated_stream_shows_expected_and_found_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(0, 255, (40, 40, 40), dtype=np.uint8)
    packed = write(tmp_path / "whole.nii.gz", noise).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        DataError, match=r"cut.nii.gz: truncated .* 64352 bytes expected after decompression, 3\d{4} found"
    ):
        open_volume(tmp_path / "cut.nii.gz")


def test_a_whole_stream_with_too_little_data_shows_expected_and_found_bytes(tmp_path: Path) -> None:
    data = gzip.decompress(write(tmp_path / "full.nii.gz", np.zeros(SHAPE, np.uint8)).read_bytes())
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(data[:-20]))
    with pytest.raises(DataError, match=rf"{len(data)} bytes expected after decompression, {len(data) - 20} found"):
        open_volume(tmp_path / "short.nii.gz")


def test_a_stream_of_several_members_is_whole(tmp_path: Path) -> None:
    data = gzip.decompress(write(tmp_path / "one.nii.gz", np.arange(60, dtype=np.uint8).reshape(3, 4, 5)).read_bytes())
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(data[:380]) + gzip.compress(data[380:]))
    box, _ = read_box(open_volume(tmp_path / "two.nii.gz"), (slice(0, 3), slice(0, 4), slice(0, 5)))
    np.testing.assert_array_equal(box.ravel(), np.arange(60))


def test_damage_inside_a_stream_is_found_while_reading(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 255, (40, 40, 40), dtype=np.uint8)
    path = write(tmp_path / "bad.nii.gz", noise)
    packed = bytearray(path.read_bytes())
    middle = len(packed) // 2
    packed[middle : middle + 2000] = bytes(2000)
    path.write_bytes(packed)  # the length at the end still agrees with the header
    with pytest.raises(DataError, match=r"bad\.nii\.gz: truncated or damaged"):
        read_box(open_volume(path), (slice(0, 40), slice(0, 40), slice(0, 40)))


def test_files_that_do_not_match_are_named_with_both_shapes(tmp_path: Path) -> None:
    first = open_volume(write(tmp_path / "image.nii", np.zeros((4, 5, 6), np.uint8)))
    other = open_volume(write(tmp_path / "label.nii", np.zeros((4, 5, 7), np.uint8)))
    with pytest.raises(DataError, match=r"image.nii has shape \(4, 5, 6\) but .*label.nii has \(4, 5, 7\)"):
        see_matching(first, other)
    mirrored = write(tmp_path / "mirror.nii", np.zeros((4, 5, 6), np.uint8), np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(DataError, match=r"is stored RAS but .* LAS"):
        see_matching(first, open_volume(mirrored))


def test_a_file_system_that_fails_is_tried_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8))
    failures, real = [errno.EIO, errno.ESTALE], nibabel.load

    def load(path: Path) -> object:
        if failures:
            raise OSError(failures.pop(), "for a moment")
        return real(path)

    monkeypatch.setattr(nibabel, "load", load)
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    volume = open_volume(path)
    assert volume.shape == (4, 5, 6)
    assert not failures
    failures.append(errno.EACCES)
    with pytest.raises(DataError, match=r"a.nii.gz: cannot be read: for a moment"):
        open_volume(path)

    def read(file: int, size: int, at: int) -> bytes:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "pread", read)
    with pytest.raises(DataError, match=r"a.nii.gz: cannot be read \(tried 4 times\): gone"):
        read_box(volume, (slice(0, 2), slice(0, 5), slice(0, 6)))
