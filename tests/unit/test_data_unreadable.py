"""What the file system refuses is named with its path and the fix, wherever it refuses."""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from meshwright.data import once, retry
from meshwright.data.field_files import find_samples
from meshwright.data.folder import find_pairs
from meshwright.data.formats import open_array
from meshwright.data.index import data_files
from meshwright.errors import DataError


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Every layout that is looked into: two folders, files by their endings, a Zarr group."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.zeros((3, 4, 5), np.uint8))
    group = zarr.open_group(tmp_path / "inside.zarr", mode="w")
    for name in ("image", "label"):
        group.create_array(name, data=np.zeros((3, 4, 5), np.uint8), chunks=(3, 4, 5))
    return tmp_path


LOOKS: dict[str, Callable[[Path], object]] = {
    "find_pairs": find_pairs,
    "find_samples": lambda path: find_samples(path, {"image": ("image",)}, {"image": 3}, None),
    "data_files": data_files,
    "open_array": lambda path: open_array(path / "images" / "a.npy"),
}
CALLS = ("listdir", "stat")


def broken(call: str, name: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.listdir` or `os.stat` of a path that ends in `name` fails once for each of `numbers`."""
    real = getattr(os, call)

    def fails(path: object = ".", **more: object) -> object:
        if str(path).endswith(name) and numbers:
            number = numbers.pop(0)
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **more)

    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr(retry, "pause", lambda seconds: None)


@pytest.mark.parametrize("look", LOOKS)
def test_a_folder_that_may_not_be_entered(look: str, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken("stat", "images/a.npy" if look == "open_array" else pairs.name, [errno.EACCES] * 9, monkeypatch)
    if look == "data_files":  # looks at what is inside first
        broken("stat", "images", [errno.EACCES] * 9, monkeypatch)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied\. Let this user read it.*chmod") as error:
        LOOKS[look](pairs)
    assert str(pairs) in str(error.value)


@pytest.mark.parametrize("look", ["find_pairs", "find_samples", "data_files"])
@pytest.mark.parametrize("name", ["", "inside.zarr"])
def test_a_folder_that_may_not_be_listed(look: str, name: str, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken("listdir", str(pairs / name), [errno.EACCES], monkeypatch)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied") as error:
        LOOKS[look](pairs)
    assert str(error.value).startswith(f"{pairs / name}: ")


@pytest.mark.parametrize("look", ["find_pairs", "data_files"])
def test_a_folder_that_fails_for_a_moment_is_listed_again(
    look: str, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pairs / "images" / "a.npy").rename(pairs / "images" / "b.npy")
    (pairs / "labels" / "a.npy").rename(pairs / "labels" / "b.npy")
    for path in sorted((pairs / "inside.zarr").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (pairs / "inside.zarr").rmdir()
    expected, numbers = LOOKS[look](pairs), [errno.ESTALE, errno.EIO]
    broken("listdir", str(pairs), numbers, monkeypatch)
    assert LOOKS[look](pairs) == expected
    assert numbers == []


@pytest.mark.parametrize("above", [False, True])
def test_a_place_where_others_can_exchange_the_folder_is_refused(
    above: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "scratch" / "mine"
    place.mkdir(parents=True)
    monkeypatch.setattr(once.tempfile, "tempdir", str(place))
    loose = pathlib.Path(tmp_path / "scratch") if above else place
    loose.chmod(0o777)
    with pytest.raises(DataError, match=rf"^{loose}: everybody may write here.*chmod \+t {loose}, or set TMPDIR"):
        once.once("key", 1, lambda file: file.write(b"x") and None)
    assert list(place.iterdir()) == []
    loose.chmod(0o1777)
    there = once.once("key", 1, lambda file: file.write(b"x") and None)
    assert there is not None
    there.close()
