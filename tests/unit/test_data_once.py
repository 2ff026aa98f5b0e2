"""A stream that cannot be cut is decoded once a host and shared; a decoder that fails or dies holds nobody up."""

from __future__ import annotations

import errno
import fcntl
import io
import multiprocessing
import os
import stat
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import once_jobs
import pytest
import zarr

from meshwright.cluster.launch import launch
from meshwright.data import once
from meshwright.data.folder import find_pairs
from meshwright.data.formats import open_array
from meshwright.data.source import batch_shape, read_batch
from meshwright.data.views import Channels, files_of
from meshwright.data.volumes import make_pairs
from meshwright.errors import DataError, RankError
from meshwright.plan.plan import Plan, interval

SHAPE = (12, 11, 10)
HEADER = 352


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for what is shared, here and in the ranks."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    random = np.random.default_rng(0)
    for case in range(2):
        image = random.normal(100, 20, SHAPE).astype(np.float32)
        for kind, array in (("image", image), ("label", (image > 100).astype(np.uint8))):
            nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(folder / f"{case}_{kind}.nii.gz")
    return folder


def test_ranks_of_one_host_decode_each_stream_once(scans: Path, temporary: Path) -> None:
    plan, indices = Plan.uniform(depth=2, width=2), (0, 1)
    found = launch(once_jobs.read_part, ranks=plan.ranks, args=(str(scans), plan, indices), threads=1)
    voxels = 2 * np.prod(SHAPE)
    assert sum(rank["read"] for rank in found) == voxels * (4 + 1) + 4 * HEADER  # every stream once, on one rank
    assert sum(rank["ideal"] for rank in found) == voxels * (4 + 1)
    # each rank takes its box from the copies, and the image was measured once
    assert sum(rank["shared"] for rank in found) == voxels * (4 + 1) + voxels * 4
    assert all(rank["left"] == [] for rank in found)
    source = make_pairs(find_pairs(scans), ("dark", "bright"))
    for rank, result in enumerate(found):
        part = read_batch(source, indices, interval(batch_shape(source, indices), plan, rank))
        digest = once_jobs.hashlib.sha256(part.image.numpy().tobytes() + part.label.numpy().tobytes()).hexdigest()
        assert result["digest"] == digest
    folder = temporary / f"meshwright-{os.getuid()}"
    assert [path.name for path in folder.iterdir()] == ["users.lock"]  # the last one has emptied it


def test_a_rank_that_takes_everything_shares_with_nobody(scans: Path, temporary: Path) -> None:
    plan = Plan.uniform(data=2)
    found = launch(once_jobs.read_part, ranks=2, args=(str(scans), plan, (0, 1)), threads=1)
    assert [rank["shared"] for rank in found] == [0, 0]


def test_a_decoder_that_fails_ends_the_job_with_one_message(scans: Path, temporary: Path) -> None:
    path = scans / "1_image.nii.gz"
    packed = bytearray(path.read_bytes())
    middle = len(packed) // 2
    packed[middle : middle + 500] = bytes(500)
    path.write_bytes(packed)
    with pytest.raises(RankError, match=r"1_image.nii.gz: truncated or damaged"):
        launch(once_jobs.read_part, ranks=3, args=(str(scans), Plan.uniform(depth=3), (0, 1)), threads=1)


def test_the_lock_of_a_decoder_that_was_killed_is_free(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, flags = multiprocessing.get_context("spawn"), temporary / "flags"
    flags.mkdir()
    os.mkfifo(flags / "begun")
    with context.Pool(1) as survivors:
        monkeypatch.setenv("RANK", "1")
        second = survivors.apply_async(_as_rank, (1, str(flags)))
        first = context.Process(target=_as_rank, args=(0, str(flags)))
        first.start()
        first.join(60)
        assert first.exitcode == -9
        assert second.get(60) == "whole"


def _as_rank(rank: int, flags: str) -> str:
    os.environ["RANK"] = str(rank)
    return once_jobs.die_while_making(flags)


def test_old_results_make_room(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "MOST_BYTES", 25)
    for number in range(4):
        with once.once(f"key{number}", 10, lambda file: file.write(b"0123456789")) as file:  # type: ignore[union-attr]
            os.utime(once._folder() / f"key{number}", ns=(number, number))
            assert len(os.pread(file.fileno(), 20, 0)) == 10
    assert sorted(path.name for path in once._folder().iterdir() if not path.suffix) == ["key2", "key3"]
    assert once.once("large", 26, lambda file: pytest.fail("there is no room")) is None
    with once.once("key3", 10, lambda file: pytest.fail("it is there")) as file:  # type: ignore[union-attr]
        assert file.read() == b"0123456789"
        (once._folder() / "key3").unlink()
        assert os.pread(file.fileno(), 20, 0) == b"0123456789"  # what is open stays readable


def test_a_folder_that_others_can_write_to_is_refused(temporary: Path) -> None:
    folder = temporary / f"meshwright-{os.getuid()}"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(DataError, match="is not a private folder of this user"):
        once.once("key", 1, lambda file: file.write(b"x"))
    folder.chmod(0o700)
    once.once("key", 1, lambda file: file.write(b"x")).close()  # type: ignore[union-attr]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_disk_that_fills_up_and_a_copy_that_vanishes_stop_nobody(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        """A file whose last block finds no room, neither while it is written nor when it is closed."""

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "no space")

    def make(file: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        real = open
        patch.setattr(once, "open", lambda path, mode: Full() if mode == "w+b" else real(path, mode), raising=False)
        assert once.once("full", 1, make) is None
    with monkeypatch.context() as patch:  # not even a folder fits
        patch.setattr(once, "_folder", lambda: make(None))
        assert (once.found("key"), once.once("key", 1, make)) == (None, None)
    folder = once._folder()
    (folder / "gone").symlink_to("nowhere")  # another rank has removed it between listing and looking
    there = once.once("new", 1, lambda file: file.write(b"x") and None)
    assert there is not None
    there.close()


def test_a_child_forked_while_a_rank_works_keeps_no_lock(temporary: Path) -> None:
    children = []

    def make(file: object) -> None:
        ready, stay = os.pipe()
        child = os.fork()
        if child == 0:  # inherits every open file, the lock too
            os.close(stay)
            os.read(ready, 1)
            os._exit(0)
        os.close(ready)
        children.append((child, stay))

    try:
        with open(once._folder() / "key.lock", "ab") as lock:
            once.once("key", 1, make).close()  # type: ignore[union-attr]
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for child, stay in children:
            os.close(stay)
            os.waitpid(child, 0)


def test_a_change_of_any_file_of_an_array_is_another_identity(tmp_path: Path) -> None:
    group = zarr.create_array(tmp_path / "a.zarr", data=np.arange(64).reshape(4, 4, 4), chunks=(2, 4, 4))
    np.save(tmp_path / "first.npy", np.zeros((4, 4, 4)))
    np.save(tmp_path / "second.npy", np.zeros((4, 4, 4)))
    channels = Channels((open_array(tmp_path / "first.npy"), open_array(tmp_path / "second.npy")))
    paths = (tmp_path / "a.zarr", *files_of(channels))
    before = [once.identity(paths)]
    (chunk,) = (path for path in (tmp_path / "a.zarr").rglob("c/1/0/0"))
    assert group.shape == (4, 4, 4)
    for changed in (chunk, tmp_path / "second.npy"):
        once._inside.cache_clear()  # another process
        assert once.identity(paths) == before[-1]
        os.utime(changed, ns=(1, 1))
        once._inside.cache_clear()
        before.append(once.identity(paths))
    assert len(set(before)) == 3
