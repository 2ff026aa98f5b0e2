"""gunzip.py against gzip itself: whatever is asked for at a time, however often the file system fails in between."""

from __future__ import annotations

import errno
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import gunzip, inflate, retry
from meshwright.data.gunzip import Gunzip
from meshwright.data.nifti import open_volume
from meshwright.data.planes import NiftiArray
from meshwright.errors import DataError

WHOLE = np.random.default_rng(0).integers(0, 9, 3000, np.uint8).tobytes()


@contextmanager
def failing(calls: set[int], number: int = errno.EIO) -> Iterator[list[float]]:
    """`os.pread` fails in these calls, counted from 0; gives the seconds that were waited."""
    real, count, waits = os.pread, iter(range(10**6)), list[float]()

    def pread(file: int, size: int, at: int) -> bytes:
        if next(count) in calls:
            raise OSError(number, "gone for a moment")
        return real(file, size, at)

    with patch.object(os, "pread", pread), patch.object(retry, "pause", waits.append):
        yield waits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3000), max_size=4),
    st.integers(0, 9),
    st.lists(st.tuples(st.booleans(), st.integers(1, 2000)), min_size=1, max_size=20),
    st.sets(st.integers(0, 60), max_size=8),
    st.sampled_from((7, 64, 4096)),
    st.sampled_from((zlib, inflate._module())),
)
def test_the_stream_is_that_of_gzip(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[int],
    padding: int,
    asked: list[tuple[bool, int]],
    failed: set[int],
    piece: int,
    module: ModuleType,
) -> None:
    """Members, padding, reads and skips of any size; some calls of the system fail, never four running."""
    path = tmp_path_factory.getbasetemp() / "stream.gz"
    path.write_bytes(b"".join(gzip.compress(WHOLE[:size]) for size in members) + b"\0" * padding * bool(members))
    expected, at = gzip.decompress(path.read_bytes()) if members else b"", 0
    calls = {call for call in failed if not {call - 1, call - 2, call - 3} <= failed}
    with (
        patch.object(gunzip, "PIECE_BYTES", piece),
        patch.object(inflate, "_module", lambda: module),
        failing(calls),
        Gunzip(path) as stream,
    ):
        if not members:
            with pytest.raises(EOFError):
                stream.read(1)
            return
        for keep, size in asked:
            piece_of = expected[at : at + size]
            assert (stream.read(size) == piece_of) if keep else (stream.skip(size) == len(piece_of))
            at += len(piece_of)
            assert stream.tell() == at
        assert stream.read(10**6) == expected[at:]


def test_it_goes_on_where_it_was_and_gives_up_after_the_last_attempt(tmp_path: Path) -> None:
    path = tmp_path / "stream.gz"
    path.write_bytes(gzip.compress(WHOLE))
    with patch.object(gunzip, "PIECE_BYTES", 100):
        with failing({3, 4, 9}) as waits, Gunzip(path) as stream:
            assert stream.read(len(WHOLE)) == WHOLE
        assert waits == [*retry.WAITS_S[:2], retry.WAITS_S[0]]
        with failing({3, 4, 5, 6}), Gunzip(path) as stream, pytest.raises(DataError, match=r"stream.gz.*tried 4 times"):
            stream.read(len(WHOLE))
        with failing({3}, errno.EACCES), Gunzip(path) as stream, pytest.raises(DataError, match=r"stream.gz: cannot"):
            stream.read(len(WHOLE))


def test_a_file_that_was_replaced_meanwhile_is_another_stream(tmp_path: Path) -> None:
    path, other = tmp_path / "stream.gz", tmp_path / "other.gz"
    path.write_bytes(gzip.compress(WHOLE))
    other.write_bytes(gzip.compress(WHOLE[::-1]))
    with patch.object(gunzip, "PIECE_BYTES", 100), failing({2}), Gunzip(path) as stream:
        stream.read(100)
        os.replace(other, path)
        with pytest.raises(DataError, match=r"stream.gz: the file was replaced while it was read"):
            stream.read(len(WHOLE))


@pytest.mark.parametrize("module", [zlib, inflate._module()])
def test_every_cut_and_every_flipped_byte_is_found(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflate, "_module", lambda: module)
    path, packed = tmp_path / "stream.gz", gzip.compress(WHOLE[:60])
    for length in range(len(packed)):
        path.write_bytes(packed[:length])
        with Gunzip(path) as stream, pytest.raises(EOFError):
            stream.read(100)
    for at in (*range(3), *range(10, len(packed))):  # between them: time, system, what the format leaves open
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
        with Gunzip(path) as stream, pytest.raises((EOFError, zlib.error)):
            stream.read(100)


def test_a_volume_is_read_although_its_file_fails_in_the_middle(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 999, (40, 30, 20), np.int16)
    nibabel.Nifti1Image(values.T, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    array = NiftiArray(open_volume(tmp_path / "a.nii.gz"))
    box = (slice(5, 33), slice(2, 29), slice(3, 20))
    with patch.object(gunzip, "PIECE_BYTES", 1000), failing({2, 8, 9, 10, 20}) as waits:
        found, read_bytes = array.read(box)
    assert len(waits) == 5
    assert np.array_equal(found, values[box])
    assert read_bytes == array.read(box)[1]
