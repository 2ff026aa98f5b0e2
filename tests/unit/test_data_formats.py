"""Every format × mesh × uneven size × halo gives the bytes of `full[slice]`, and reading costs what it must."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import formats, raw, retry
from meshwright.data.arrays import StoredArray, box_bytes
from meshwright.data.formats import open_array
from meshwright.data.source import widened
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval

SHAPE = (13, 10, 9)  # uneven over 2, 3 and 4 ranks
CHUNKS = (4, 3, 5)


def _npy(path: Path, array: np.ndarray) -> str:
    np.save(path.with_suffix(".npy"), array)
    return str(path.with_suffix(".npy"))


def _npy_fortran(path: Path, array: np.ndarray) -> str:
    return _npy(path, np.asfortranarray(array))


def _hdf5(**options: Any) -> Callable[[Path, np.ndarray], str]:
    def write(path: Path, array: np.ndarray) -> str:
        with h5py.File(path.with_suffix(".h5"), "w") as file:
            chunks = {"chunks": (1,) * (array.ndim - 3) + CHUNKS} if options else {}
            file.create_dataset("scan/image", data=array, **chunks, **options)
        return f"{path.with_suffix('.h5')}::scan/image"

    return write


def _zarr(version: int, **options: Any) -> Callable[[Path, np.ndarray], str]:
    def write(path: Path, array: np.ndarray) -> str:
        more = dict(options)
        if more.pop("sharded", False):
            more["shards"] = tuple(2 * size for size in (1,) * (array.ndim - 3) + CHUNKS)
        chunks = (1,) * (array.ndim - 3) + CHUNKS
        target = path.with_suffix(".zarr")
        zarr.create_array(target, data=array, chunks=chunks, zarr_format=version, **more)  # type: ignore[arg-type]
        return str(target)

    return write


def _nifti(suffix: str) -> Callable[[Path, np.ndarray], str]:
    def write(path: Path, array: np.ndarray) -> str:
        nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(path.with_suffix(suffix))
        return str(path.with_suffix(suffix))

    return write


FORMATS: dict[str, Callable[[Path, np.ndarray], str]] = {
    "npy": _npy,
    "npy, Fortran order": _npy_fortran,
    "HDF5 contiguous": _hdf5(),
    "HDF5 chunked": _hdf5(shuffle=False),
    "HDF5 gzip": _hdf5(compression="gzip", shuffle=True, fletcher32=True),
    "HDF5 lzf": _hdf5(compression="lzf"),
    "Zarr 2": _zarr(2),
    "Zarr 3": _zarr(3),
    "Zarr 3 uncompressed": _zarr(3, compressors=None),
    "Zarr 3 sharded": _zarr(3, sharded=True),
    "NIfTI": _nifti(".nii"),
    "NIfTI gz": _nifti(".nii.gz"),
}
EXACT = {"npy", "npy, Fortran order", "HDF5 contiguous", "NIfTI"}
DTYPES = ("<i2", ">i2", "<f4", "u1", "<f8")

meshes = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in ("depth", "height", "width")})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], tuple[StoredArray, np.ndarray]]:
    """The array of a format, written once: (format, channels, dtype) → (opened, whole)."""
    folder, known = tmp_path_factory.mktemp("formats"), {}

    def get(name: str, channels: int, dtype: str) -> tuple[StoredArray, np.ndarray]:
        key = (name, channels, dtype)
        if key not in known:
            shape = (channels, *SHAPE) if channels else SHAPE
            whole = np.random.default_rng(len(known)).integers(0, 120, shape).astype(dtype)
            known[key] = (open_array(FORMATS[name](folder / f"array{len(known)}", whole)), whole)
        return known[key]

    return get


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(
    mesh=meshes,
    rank=st.integers(0, 63),
    halo=st.integers(0, 3),
    channels=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_part_is_the_slice_of_the_whole(
    written: Any, name: str, mesh: dict[str, int], rank: int, halo: int, channels: int, dtype: str
) -> None:
    if channels == 1 and name.startswith("NIfTI"):
        channels = 0  # the format has no single channel
    array, whole = written(name, channels, dtype)
    plan = Plan.uniform(**mesh)
    own = interval(SHAPE, plan, rank % plan.ranks, layout="DHW")
    spans = widened(own, SHAPE, halo)
    box = (slice(0, channels), *spans) if channels else spans
    values, read_bytes = array.read(box)
    assert (values.dtype.kind, values.dtype.itemsize) == (whole.dtype.kind, whole.dtype.itemsize)
    assert values.astype(whole.dtype).tobytes() == whole[box].tobytes()
    ideal = box_bytes(array, box)
    assert ideal == values.nbytes
    if name in EXACT:
        assert read_bytes == ideal
    else:
        assert (read_bytes >= ideal) if ideal else read_bytes == 0
    # the same in pieces
    pieces, spent = np.empty_like(values), 0
    for slab in array.slabs(box):
        pieces[slab.where] = slab.values
        spent += slab.read_bytes
    assert pieces.tobytes() == values.tobytes()
    assert spent == read_bytes


@pytest.mark.parametrize("name", ["HDF5 chunked", "HDF5 gzip", "Zarr 2", "Zarr 3", "Zarr 3 sharded"])
def test_cuts_at_chunks_cost_nothing_more(written: Any, name: str) -> None:
    array, whole = written(name, 0, "<i2")
    assert array.chunks == CHUNKS
    spans = (slice(4, 12), slice(3, 6), slice(0, 5))
    values, read_bytes = array.read(spans)
    assert read_bytes == box_bytes(array, spans)
    np.testing.assert_array_equal(values, whole[spans])
    across = (slice(3, 5), slice(3, 6), slice(0, 5))  # two planes of two chunks
    assert array.read(across)[1] == 2 * 4 * 3 * 5 * 2 == 4 * box_bytes(array, across)


def test_slabs_never_decode_a_chunk_twice(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array, _ = written("Zarr 3", 2, "<i2")
    monkeypatch.setattr("meshwright.data.arrays.SLAB_BYTES", 1)
    spans = (slice(0, 2), slice(2, 13), slice(0, 10), slice(1, 9))
    slabs = list(array.slabs(spans))
    assert len(slabs) == 4  # 2:4, 4:8, 8:12, 12:13
    assert sum(slab.read_bytes for slab in slabs) == array.read(spans)[1]


def test_a_box_outside_is_refused(written: Any) -> None:
    for name in FORMATS:
        array, _ = written(name, 0, "<i2")
        for spans in ((slice(0, 14), slice(0, 10), slice(0, 9)), (slice(0, 1), slice(0, 1))):
            with pytest.raises(DataError, match=r"no part of shape \(13, 10, 9\)"):
                array.read(spans)


def test_what_is_missing_damaged_or_no_number_is_named(tmp_path: Path) -> None:
    whole = np.zeros(SHAPE, np.int16)
    for name, write in FORMATS.items():
        where = write(tmp_path / f"cut{len(name)}", whole)
        path = Path(where.partition("::")[0])
        if path.is_dir():
            continue
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(DataError, match=rf"{path.name}.*(truncated|damaged)"):
            open_array(where).read(tuple(slice(0, size) for size in SHAPE))
    np.save(tmp_path / "objects.npy", np.full(SHAPE, None), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.zeros(SHAPE, complex))
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.h5").write_bytes(b"")
    for name, words in (
        ("none.npy", "no such file"),
        ("objects.npy", "values of type object"),
        ("complex.npy", "values of type complex128"),
        ("flat.npy", r"shape \(3, 4\); at least"),
        ("text.npy", "not a .npy file"),
        ("empty.h5", "datasets|not an HDF5 file"),
        ("none.zarr", "no such"),
    ):
        with pytest.raises(DataError, match=f"{name}.*{words}|{words}.*{name}"):
            open_array(tmp_path / name)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
    everything = tuple(slice(0, size) for size in SHAPE)
    for name in ("Zarr 2", "Zarr 3", "Zarr 3 uncompressed", "Zarr 3 sharded"):
        where = Path(FORMATS[name](tmp_path / name.replace(" ", ""), whole))
        chunk = max(
            (path for path in where.rglob("*") if path.is_file() and "z" not in path.name),
            key=lambda path: path.stat().st_size,
        )
        chunk.write_bytes(chunk.read_bytes()[:-7])
        with pytest.raises(DataError, match=rf"{where.name}: truncated or damaged"):
            open_array(where).read(everything)
    where = FORMATS["HDF5 gzip"](tmp_path / "packed", whole)
    path = Path(where.partition("::")[0])
    data = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk_at = file["scan/image"].id.get_chunk_info(3)
    data[chunk_at.byte_offset : chunk_at.byte_offset + chunk_at.size] = bytes(chunk_at.size)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"packed.h5::scan/image: truncated or damaged"):
        open_array(where).read(everything)


def test_a_codec_that_could_run_code_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    where = Path(FORMATS["Zarr 2"](tmp_path / "old", np.zeros(SHAPE, np.int16)))
    metadata = json.loads((where / ".zarray").read_text())
    (where / ".zarray").write_text(json.dumps({**metadata, "filters": [{"id": "pickle", "protocol": 5}]}))
    with pytest.raises(DataError, match=r"old.zarr: codec 'pickle' is not read here"):
        open_array(where)
    both = Path(FORMATS["Zarr 3"](tmp_path / "both", np.zeros(SHAPE, np.int16)))
    (both / ".zarray").write_bytes((where / ".zarray").read_bytes())
    with pytest.raises(DataError, match=r"both.zarr: codec 'pickle' is not read here"):
        open_array(both)
    (both / ".zarray").write_text(json.dumps(metadata))
    newer = json.loads((both / "zarr.json").read_text())
    newer["codecs"].append({"name": "numcodecs.pickle"})
    (both / "zarr.json").write_text(json.dumps(newer))
    with pytest.raises(DataError, match=r"both.zarr: codec 'numcodecs.pickle' is not read here"):
        open_array(both)
    where = Path(FORMATS["Zarr 3 sharded"](tmp_path / "new", np.zeros(SHAPE, np.int16)))
    metadata = json.loads((where / "zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["codecs"].append({"name": "vlen-bytes"})
    (where / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=r"new.zarr: codec 'vlen-bytes' is not read here"):
        open_array(where)
    (where / "zarr.json").write_text("{")
    with pytest.raises(DataError, match=r"zarr.json: not JSON"):
        open_array(where)


def test_numbers_that_hdf5_stores_in_its_own_way(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    box = (slice(0, 2), slice(1, 3), slice(0, 4))
    with h5py.File(tmp_path / "own.h5", "w", userblock_size=1024) as file:
        kind = h5py.h5t.STD_I16LE.copy()  # 12 bits, in the upper part of the word
        kind.set_precision(12)
        kind.set_offset(4)
        space = h5py.h5s.create_simple(whole.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"packed", kind, space))[...] = whole
        file["behind a user block"], file["bool"] = whole.astype(">i2"), whole > 7
        layout = h5py.VirtualLayout(whole.shape, whole.dtype)
        layout[...] = h5py.VirtualSource(".", "behind a user block", whole.shape)
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("never written", whole.shape, "i2", fillvalue=5)
    for name, expected in (
        ("packed", whole),
        ("behind a user block", whole),
        ("bool", whole > 7),
        ("virtual", whole),
        ("never written", np.full_like(whole, 5)),
    ):
        np.testing.assert_array_equal(open_array(f"{tmp_path}/own.h5::{name}").read(box)[0], expected[box], name)


def test_a_dataset_is_named_or_the_only_one(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b/c"] = np.zeros(SHAPE), np.ones(SHAPE)
    assert open_array(f"{tmp_path}/two.h5::b/c").read((slice(0, 1),) * 3)[0] == 1
    with pytest.raises(DataError, match=r"2 datasets \(a, b/c\); name one"):
        open_array(tmp_path / "two.h5")
    with pytest.raises(DataError, match=r"two.h5::d: no such dataset; the file has: a, b/c"):
        open_array(f"{tmp_path}/two.h5::d")
    with pytest.raises(DataError, match="only HDF5 files and Zarr folders"):
        open_array(f"{_npy(tmp_path / 'x', np.zeros(SHAPE))}::d")
    (tmp_path / "scan.dcm").touch()
    with pytest.raises(DataError, match=r"scan.dcm: unknown format; known endings: .nii,"):
        open_array(tmp_path / "scan.dcm")


@pytest.mark.parametrize(
    ("module", "extra"), [("h5py", "HDF5 files needs h5py"), ("zarr", "Zarr needs zarr 3"), ("nibabel", "nibabel")]
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"h5py": "HDF5 gzip", "zarr": "Zarr 3", "nibabel": "NIfTI"}[module]
    where = FORMATS[name](tmp_path / "x", np.zeros(SHAPE, np.int16))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=rf"{extra}.*pip install 'meshwright\["):
        formats.open_array(where)


class Flaky:
    """`os.preadv` that fails `failures` times with `error`, gives short reads, then reads."""

    def __init__(self, failures: int, error: int) -> None:
        self.left, self.error, self.real = failures, error, os.preadv

    def __call__(self, file: int, buffers: list[memoryview], offset: int) -> int:
        if self.left:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error))
        return self.real(file, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(retry, "pause", waited.append)
    return waited


def test_transient_errors_are_tried_again_and_short_reads_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    whole = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
    array = open_array(_npy(tmp_path / "x", whole))
    spans = (slice(1, 9), slice(2, 9), slice(0, 9))
    for error in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        pauses.clear()
        monkeypatch.setattr(raw.os, "preadv", Flaky(len(retry.WAITS_S), error))
        np.testing.assert_array_equal(array.read(spans)[0], whole[spans])
        assert pauses == list(retry.WAITS_S)
    monkeypatch.setattr(raw.os, "preadv", Flaky(len(retry.WAITS_S) + 1, errno.EIO))
    with pytest.raises(DataError, match=r"x.npy: cannot be read \(tried 4 times\): Input/output error"):
        array.read(spans)
    pauses.clear()
    monkeypatch.setattr(raw.os, "preadv", Flaky(1, errno.EACCES))
    with pytest.raises(DataError, match=r"x.npy: cannot be read: Permission denied"):
        array.read(spans)
    assert pauses == []


def test_hdf5_says_its_errors_as_text(pauses: list[float]) -> None:
    failures = [OSError("Can't synchronously read data (file read failed: errno = 5, error message = 'I/O error')")]

    def read() -> str:
        if failures:
            raise failures.pop()
        return "read"

    assert retry.retried(read, "x.h5") == "read"
    assert pauses == [retry.WAITS_S[0]]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = Path(_npy(tmp_path / "x", np.zeros(SHAPE, np.int16)))
    array = open_array(path)
    header = io.BytesIO(path.read_bytes())
    path.write_bytes(header.read(600))
    with pytest.raises(DataError, match=r"x.npy: truncated or damaged: 2468 bytes expected, 600 found"):
        array.read(tuple(slice(0, size) for size in SHAPE))


def test_the_stated_bytes_are_those_that_the_kernel_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them: an HDF5 file's own metadata, and the read-ahead of Python's files (8 KiB a shard)."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("no /proc/self/io on this system")
    monkeypatch.setattr(__name__ + ".CHUNKS", (16, 16, 16))
    whole = np.random.default_rng(0).integers(0, 30000, (64, 64, 64)).astype("<i2")
    for name, write in FORMATS.items():
        array = open_array(write(tmp_path / f"array{len(list(tmp_path.iterdir()))}", whole))
        array.read((slice(0, 1),) * 3)
        before = int(counter.read_text().split()[1])
        values, read_bytes = array.read((slice(3, 9), slice(0, 64), slice(0, 64)))
        seen = int(counter.read_text().split()[1]) - before
        assert values.nbytes == 6 * 64 * 64 * 2
        assert seen <= read_bytes + (1 << 10 if name in EXACT else 40 << 10), name


def test_hdf5_links_lead_to_the_linked_file_and_missing_virtual_sources_are_named(tmp_path: Path) -> None:
    values = np.arange(64, dtype="<i2").reshape(4, 4, 4)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = values
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["large"] = np.ones((30, 30, 30))  # so that the linked dataset's offset lies inside this file
        file["image"] = h5py.ExternalLink("other.h5", "/image")
        layout = h5py.VirtualLayout((4, 4, 4), "<i2")
        layout[:] = h5py.VirtualSource("other.h5", "image", (4, 4, 4))
        file.create_virtual_dataset("virtual", layout)
    for dataset in ("image", "virtual"):
        read = open_array(f"{tmp_path / 'link.h5'}::{dataset}").read((slice(0, 4),) * 3)[0]
        assert np.array_equal(read, values), dataset
    (tmp_path / "other.h5").rename(tmp_path / "elsewhere.h5")
    with pytest.raises(DataError, match=r"link.h5::virtual: a virtual dataset of other.h5, which is missing"):
        open_array(f"{tmp_path / 'link.h5'}::virtual")


def test_numbers_that_are_not_the_values_yet_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        item = file.create_dataset("image", data=np.zeros((2, 3, 4), np.int16))
        item.attrs["scale_factor"], item.attrs["add_offset"] = 1.0, np.array([0.0])
    assert open_array(tmp_path / "a.h5").shape == (2, 3, 4)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["image"].attrs["scale_factor"] = 0.1
    array = zarr.create_array(tmp_path / "a.zarr", data=np.zeros((2, 3, 4)), chunks=(2, 3, 4))
    array.attrs["add_offset"] = -5
    for name, attribute in (("a.h5", "scale_factor"), ("a.zarr", "add_offset")):
        with pytest.raises(DataError, match=f"{name}.*: the attribute {attribute} is .*write the values themselves"):
            open_array(tmp_path / name)
