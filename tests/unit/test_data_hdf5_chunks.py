"""hdf5_chunks.py against the library: the same numbers whatever the dataset, and the library where it has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import hdf5
from meshwright.data.formats import open_array
from meshwright.data.hdf5_chunks import located
from meshwright.errors import DataError

OURS: tuple[dict[str, Any], ...] = (
    {},
    {"compression": "gzip"},
    {"shuffle": True},
    {"compression": "gzip", "compression_opts": 9, "shuffle": True},
)
THEIRS: tuple[dict[str, Any], ...] = (
    {"compression": "lzf"},
    {"compression": "gzip", "fletcher32": True},
    {"shuffle": True, "compression": "lzf"},
    {"scaleoffset": 0},
)
DTYPES = ("i2", ">i4", "u1", "f4", "<f8", "f2")


def spans(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    ends = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return tuple(slice(low, high) for low, high in ends)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_box_is_that_of_the_library(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks.h5"
    shape = tuple(data.draw(st.tuples(*[st.integers(1, 12)] * 3)))
    chunk = tuple(data.draw(st.integers(1, size)) for size in shape)
    how, dtype = data.draw(st.sampled_from(OURS + THEIRS)), data.draw(st.sampled_from(DTYPES))
    if "scaleoffset" in how:
        dtype = "i2"
    whole = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    with h5py.File(path, "w") as file:
        made = file.create_dataset("v", shape, dtype, chunks=chunk, fillvalue=7, **how)
        written = slice(0, data.draw(st.integers(0, shape[0])))  # other chunks hold the fill value, and lie nowhere
        made[written] = whole[written]
        expected = made[:]
    box = data.draw(st.composite(spans)(shape))
    found, read_bytes = open_array(path).read(box)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected[box])
    touched = [-(-span.stop // size) - span.start // size for span, size in zip(box, chunk, strict=True)]
    assert read_bytes == (np.prod(touched) * np.prod(chunk) * whole.itemsize if found.size else 0)


@pytest.mark.parametrize("how", OURS, ids=str)
def test_what_most_files_are_needs_no_lock_of_the_library(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.random.default_rng(0).integers(0, 99, (9, 8, 7)).astype("i2")
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_dataset("v", data=whole, chunks=(2, 3, 7), **how)
    array = open_array(tmp_path / "v.h5")

    def refuse(*_: object) -> None:
        raise AssertionError("read by the library")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    found, _ = array.read((slice(1, 8), slice(0, 5), slice(2, 7)))
    np.testing.assert_array_equal(found, whole[1:8, 0:5, 2:7])


def refused(path: Path, box: tuple[slice, ...] = (slice(0, 4),) * 3) -> bool:
    with hdf5.opened(path) as file:
        return located(file["v"], box) is None


def test_what_the_library_has_to_read(tmp_path: Path) -> None:
    whole = np.arange(64, dtype="i2").reshape(4, 4, 4)
    for number, how in enumerate(THEIRS):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file.create_dataset("v", data=whole, chunks=(2, 4, 4), **how)
        assert refused(tmp_path / f"{number}.h5"), how
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as file:  # offsets count from behind it
        file.create_dataset("v", data=whole, chunks=(2, 4, 4))
    assert refused(tmp_path / "block.h5")
    with h5py.File(tmp_path / "mask.h5", "w") as file:  # a chunk that was written past its filter
        made = file.create_dataset("v", (4, 4, 4), "i2", chunks=(2, 4, 4), compression="gzip")
        made[2:] = whole[2:]
        made.id.write_direct_chunk((0, 0, 0), whole[:2].tobytes(), filter_mask=1)
    assert refused(tmp_path / "mask.h5")
    assert not refused(tmp_path / "mask.h5", (slice(2, 4), slice(0, 4), slice(0, 4)))
    np.testing.assert_array_equal(open_array(tmp_path / "mask.h5").read((slice(0, 4),) * 3)[0], whole)


def test_damage_is_named_by_the_library(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 999, (4, 8, 8)).astype("i2")
    with h5py.File(tmp_path / "v.h5", "w") as file:
        made = file.create_dataset("v", data=whole, chunks=(2, 8, 8), compression="gzip")
        at = made.id.get_chunk_info_by_coord((2, 0, 0))
    content = bytearray((tmp_path / "v.h5").read_bytes())
    content[at.byte_offset + at.size // 2] ^= 0xFF
    (tmp_path / "v.h5").write_bytes(content)
    array = open_array(tmp_path / "v.h5")
    np.testing.assert_array_equal(array.read((slice(0, 2), slice(0, 8), slice(0, 8)))[0], whole[:2])
    with pytest.raises(DataError, match=r"v.h5::v: truncated or damaged"):
        array.read((slice(0, 4), slice(0, 8), slice(0, 8)))
