"""Before training: an index that finds what is lost or changed, a conversion that goes on after a kill."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from test_data_folder import COUNT, IMAGES, LABELS, SHAPE, decathlon, four_channels, two_folders, zarr_files

from meshwright import config
from meshwright.cli import main
from meshwright.data import convert, index
from meshwright.data.arrays import box_bytes
from meshwright.data.folder import find_pairs
from meshwright.data.formats import open_array
from meshwright.data.volumes import make_pairs
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval
from meshwright.train.job import sources


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_index_finds_what_is_missing_changed_or_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = zarr_files(tmp_path)
    assert run("data", "index", folder) == 0
    files = index.data_files(folder)
    assert set(index.read_index(folder) or {}) == set(files)
    assert run("data", "index", folder, "--check") == 0
    assert "0 differences" in capsys.readouterr().out
    settings = config.load(None, [f"data.path={folder}"])
    assert len(sources(settings)[0].names) == 2
    chunks = [name for name in files if Path(name).name[0].isdigit() and "image" in name]
    damaged = folder / chunks[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (folder / chunks[1]).unlink()  # zarr would read the fill value
    (folder / "new.npy").write_bytes(b"")
    assert run("data", "index", folder, "--check") == 1
    text = capsys.readouterr().out
    for words in (
        f"{chunks[0]}: other contents",
        f"{chunks[1]}: missing",
        "new.npy: not in the index",
        "3 differences",
    ):
        assert words in text
    with pytest.raises(DataError, match=rf"{chunks[1]}: it is missing; the index .* says \d+ bytes"):
        sources(settings)
    (folder / chunks[1]).write_bytes(b"123")
    with pytest.raises(DataError, match="it has 3 bytes"):
        sources(settings)
    (folder / index.INDEX).write_text("[]")
    with pytest.raises(DataError, match=r"meshwright-index.json: damaged"):
        sources(settings)


def test_a_sample_of_which_nothing_is_left_is_missed(tmp_path: Path) -> None:
    folder = two_folders(tmp_path)
    assert run("data", "index", folder) == 0
    assert len(find_pairs(folder)) == COUNT
    (folder / "images/case1.nii.gz").unlink()
    (folder / "labels/case1.npy").unlink()
    with pytest.raises(DataError, match=r"case1.nii.gz: it is missing, and 1 more of the 6 in .*meshwright data index"):
        find_pairs(folder)
    reasons: list[str] = []
    assert len(find_pairs(folder, bad=reasons)) == COUNT - 1
    assert len(reasons) == 1


def test_a_folder_that_takes_no_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_folders(tmp_path)
    (folder / index._PARTIAL).mkdir()
    monkeypatch.setattr(index, "_noted", lambda folder: {})
    with pytest.raises(DataError, match=r"the index cannot be written: Is a directory"):
        index.write_index(folder)


def test_an_index_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = two_folders(tmp_path), []
    real = index.digest

    def digest(path: Path) -> index.Entry:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(index, "digest", digest)
    with pytest.raises(KeyboardInterrupt):
        index.write_index(folder, workers=1)
    assert index.read_index(folder) is None
    noted = (folder / index._PARTIAL).read_text()
    (folder / index._PARTIAL).write_text(noted + '["torn["images/case0.nii.gz", 1, 1, "0"]\n["torn')
    again: list[str] = []
    monkeypatch.setattr(index, "digest", lambda path: (again.append(path.name), real(path))[1])
    assert index.write_index(folder) == 2 * COUNT
    assert len(again) == 2 * COUNT - noted.count("\n")
    assert not (folder / index._PARTIAL).exists()
    assert index.differences(folder) == []


@given(
    shape=st.tuples(*(st.integers(1, 300) for _ in range(3))),
    ranks=st.tuples(*(st.integers(1, 5) for _ in range(3))),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_no_chunk_is_cut_by_the_plan(shape: tuple[int, int, int], ranks: tuple[int, int, int], itemsize: int) -> None:
    plan = Plan.uniform(depth=ranks[0], height=ranks[1], width=ranks[2])
    chunks = convert.chunks_for(shape, plan, itemsize)
    assert np.prod(chunks) * itemsize <= convert.CHUNK_BYTES
    for rank in range(plan.ranks):
        for span, chunk, size in zip(interval(shape, plan, rank, layout="DHW"), chunks, shape, strict=True):
            assert span.start == span.stop or span.start % chunk == 0
            assert span.start == span.stop or span.stop % chunk == 0 or span.stop == size


@pytest.mark.parametrize("kind", ["zarr", "hdf5", "npy"])
@pytest.mark.parametrize("layout", [two_folders, decathlon, zarr_files])
def test_what_is_converted_is_the_same_data(kind: str, layout: object, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    layout(source)  # type: ignore[operator]
    assert run("data", "convert", source, target, "--to", kind, "--depth", 2, "--width", 2) == 0
    pairs = find_pairs(target)
    assert len(pairs) == COUNT
    plan = Plan.uniform(depth=2, width=2)
    for case, pair in enumerate(pairs):
        assert (pair.image.dtype, pair.label.dtype) == (np.int16, np.uint8)
        for rank in range(plan.ranks):
            spans = interval(SHAPE, plan, rank, layout="DHW")
            for array, whole in ((pair.image, IMAGES[case]), (pair.label, LABELS[case])):
                values, read_bytes = array.read(spans)
                np.testing.assert_array_equal(values, whole[spans])
                if rank == 0:  # its box is whole chunks; the last ones reach over the end
                    assert read_bytes == box_bytes(array, spans)
    assert not list(target.rglob(".*"))
    assert run("data", "convert", source, target, "--to", kind, "--depth", 2, "--width", 2) == 0  # nothing to do
    if kind == "zarr":
        with pytest.raises(DataError, match="exists and is another array"):
            convert.convert(convert.targets(find_pairs(source), target, "zarr", Plan.uniform())[0], "zarr")


def test_channels_and_spacing_survive(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    four_channels(source, "files")
    for kind in ("zarr", "hdf5"):
        assert run("data", "convert", source, tmp_path / kind, "--to", kind, "--height", 2) == 0
        found = make_pairs(find_pairs(tmp_path / kind))
        assert found.fields["image"].sizes == (2,)
        assert found.pairs[0].image.dtype == np.int16
        np.testing.assert_array_equal(
            found.pairs[1].image.read((slice(1, 2), slice(0, 7), slice(0, 6), slice(0, 5)))[0][0], IMAGES[1] // 3 + 7
        )
    array = zarr.open_array(tmp_path / "zarr/images/case0.zarr")
    array.attrs["spacing_mm"] = [3, 2, 1.5]
    assert open_array(tmp_path / "zarr/images/case0.zarr").spacing_mm == (3.0, 2.0, 1.5)
    array.attrs["spacing_mm"] = "wide"
    with pytest.raises(DataError, match="attribute spacing_mm is 'wide'"):
        open_array(tmp_path / "zarr/images/case0.zarr")


@pytest.mark.parametrize("kind", ["zarr", "npy", "hdf5"])
def test_a_conversion_goes_on_after_a_kill(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    two_folders(source)
    monkeypatch.setattr(convert, "CHUNK_BYTES", 2 * 6 * 5 * 2)  # slabs of a plane or two
    make = lambda: convert.targets(find_pairs(source), tmp_path / "target", kind, Plan.uniform())[0]  # type: ignore[arg-type]  # noqa: E731
    target, heard = make(), []

    def kill(size: int) -> None:
        heard.append(size)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(target, kind, kill)  # type: ignore[arg-type]
    assert not target.path.exists()
    written: list[object] = []
    real = getattr(convert, f"_{kind}")

    def watched(*arguments: object) -> object:
        write, close = real(*arguments)
        return (lambda where, values: (written.append(where), write(where, values))), close

    monkeypatch.setattr(convert, f"_{kind}", watched)
    convert.convert(make(), kind)  # type: ignore[arg-type]
    slabs = -(-SHAPE[0] // target.chunks[0])
    assert len(written) == (slabs if kind == "hdf5" else slabs - 3)
    everything = tuple(slice(0, size) for size in SHAPE)
    np.testing.assert_array_equal(open_array(target.path).read(everything)[0], IMAGES[0])
    assert not [path for path in target.path.parent.iterdir() if path.name.startswith(".")]


def test_a_conversion_of_another_source_begins_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    two_folders(source)
    first = convert.targets(find_pairs(source), tmp_path / "target", "npy", Plan.uniform())[0]
    first.path.parent.mkdir(parents=True)
    np.lib.format.open_memmap(first.partial, mode="w+", dtype=np.int16, shape=SHAPE)
    first.notes.write_text("something else\n" + "done\n" * 7)
    convert.convert(first, "npy")
    np.testing.assert_array_equal(np.load(first.path), IMAGES[0])


def test_an_older_result_and_two_calls_at_once_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    two_folders(source)
    target = convert.targets(find_pairs(source), tmp_path / "target", "hdf5", Plan.uniform())[0]
    target.path.parent.mkdir(parents=True)
    with open(target.notes, "a") as notes:
        fcntl.flock(notes, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"case0.h5: another call is writing it"):
            convert.convert(target, "hdf5")
    convert.convert(target, "hdf5")
    convert.convert(target, "hdf5")
    changed_ns = target.path.stat().st_mtime_ns + 1
    os.utime(target.array.path, ns=(changed_ns, changed_ns))
    with pytest.raises(DataError, match=r"case0.h5 was made before .*case0.nii.gz changed. Remove it"):
        convert.convert(target, "hdf5")
    assert not [path for path in target.path.parent.iterdir() if path.name.startswith(".")]


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("index", tmp_path / "none"), "none: no such folder"),
        (("index", tmp_path / "empty"), "no data files to index"),
        (("index", tmp_path / "empty", "--check"), "no meshwright-index.json to compare with"),
        (("convert", tmp_path / "none", tmp_path / "x"), "there is no"),
        (("convert", tmp_path / "empty", tmp_path / "a/b"), "no such folder; the target is made inside it"),
    ):
        assert run("data", *arguments) == 1
        assert words in capsys.readouterr().err
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_zarr_source_written_in_place_is_newer_than_what_was_made_of_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source, target = zarr_files(tmp_path / "source"), tmp_path / "target"
    make = lambda: [convert.convert(t, kind) for t in convert.targets(find_pairs(source), target, kind, Plan.uniform())]  # type: ignore[arg-type]  # noqa: E731
    make()
    make()
    array = zarr.open_array(source / "1.zarr/image", mode="r+")
    before = (source / "1.zarr/image").stat().st_mtime_ns
    array[0, 0, 0] = array[0, 0, 0] + 1  # one chunk, which lies deeper
    assert (source / "1.zarr/image").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"images/1.* was made before .*1.zarr/image/.* changed. Remove it"):
        make()


def test_a_zarr_array_written_anew_is_not_read_as_what_it_was(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=np.arange(64.0).reshape(4, 4, 4), chunks=(2, 4, 4))
    array, box = open_array(tmp_path / "a.zarr"), (slice(0, 2), slice(0, 4), slice(0, 4))
    assert array.read(box)[0][1, 3, 3] == 31
    again = np.arange(64, dtype=np.int64).reshape(4, 4, 4)
    zarr.create_array(tmp_path / "a.zarr", data=again, chunks=(2, 4, 4), overwrite=True)
    with pytest.raises(DataError, match=r"a.zarr: it was written anew after it had been opened"):
        array.read(box)
    assert open_array(tmp_path / "a.zarr").read(box)[0][1, 3, 3] == 31
