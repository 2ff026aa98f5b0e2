"""Samples of seven fields in every layout of files, and what ranks run with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.distributed as dist
import zarr

import meshwright as mw
from meshwright.data.fields import FieldSource, Stored, open_fields
from meshwright.data.rearrange import Crop, Flip, Roll
from meshwright.data.store import Store
from meshwright.data.transforms import Compose, Transform

COUNT, SHAPE = 5, (7, 6, 5)
LAYOUTS = {
    "image": Stored("DHW", ("t1", "t2"), scale=0.25, shift=-3.0),
    "label": "DHW",
    "flow": Stored("CDHW", dtype=torch.int16),
    "parameters": "K",
    "matrix": Stored("KL", dtype=torch.float64),
    "cube": Stored("KLM", dtype=torch.int32),  # of as many dims as the volume, but not cut with it
    "age": Stored("", dtype=torch.int64),
}
_random = np.random.default_rng(5)
ON_DISK = [
    {
        "t1": _random.integers(-900, 1200, SHAPE, dtype=np.int16),
        "t2": _random.integers(0, 60000, SHAPE, dtype=np.uint16),
        "label": _random.integers(0, 3, SHAPE, dtype=np.int32),
        "flow": _random.integers(-30000, 30000, (3, *SHAPE)).astype(">i4"),
        "parameters": _random.normal(size=4),
        "matrix": _random.normal(size=(2, 3)),
        "cube": _random.integers(-(1 << 20), 1 << 20, SHAPE),
        "age": np.array(_random.integers(0, 100)),
    }
    for _ in range(COUNT)
]
WORDS = tuple(ON_DISK[0])


def expected(index: int) -> dict[str, np.ndarray]:
    """The fields of sample `index`, whole."""
    found = dict(ON_DISK[index])
    image = np.stack([found.pop("t1"), found.pop("t2")]).astype(np.float64) * 0.25 - 3
    return {
        "image": image.astype(np.float32),
        "label": found["label"].astype(np.uint8),
        "flow": found["flow"].astype(np.int16),
        "parameters": found["parameters"].astype(np.float32),
        "matrix": found["matrix"],
        "cube": found["cube"].astype(np.int32),
        "age": found["age"].astype(np.int64),
    }


def hdf5_files(folder: Path) -> Path:
    for index, sample in enumerate(ON_DISK):
        with h5py.File(folder / f"{index}.h5", "w") as file:
            for word, values in sample.items():
                chunked = {"chunks": (3, 3, 3), "compression": "gzip"} if index % 2 and values.shape == SHAPE else {}
                file.create_dataset(word, data=values, **chunked)
    return folder


def hdf5_groups(folder: Path) -> Path:
    with h5py.File(folder / "all.h5", "w") as file:
        for index, sample in enumerate(ON_DISK):
            for word, values in sample.items():
                file[f"run/{index}/{word}"] = values
    return folder / "all.h5"


def hdf5_stack(folder: Path) -> Path:
    with h5py.File(folder / "all.h5", "w") as file:
        for word in WORDS:
            file[word] = np.stack([sample[word] for sample in ON_DISK])
    return folder / "all.h5"


def zarr_files(folder: Path) -> Path:
    for index, sample in enumerate(ON_DISK):
        group = zarr.open_group(folder / f"{index}.zarr", mode="w", zarr_format=2 + index % 2)  # type: ignore[arg-type]
        for word, values in sample.items():
            group.create_array(word, data=values)
    return folder


def zarr_stack(folder: Path) -> Path:
    group = zarr.open_group(folder / "all.zarr", mode="w")
    for word in WORDS:
        stack = np.stack([sample[word] for sample in ON_DISK])
        group.create_array(word, data=stack, chunks=(1, *stack.shape[1:]))
    return folder


def npy_folders(folder: Path) -> Path:
    for word in WORDS:
        (folder / word).mkdir()
        for index, sample in enumerate(ON_DISK):
            np.save(folder / word / f"case{index}.npy", sample[word])
    return folder


def npy_endings(folder: Path) -> Path:
    for index, sample in enumerate(ON_DISK):
        for word, values in sample.items():
            np.save(folder / f"case{index}_{word}.npy", np.asfortranarray(values) if values.ndim else values)
    return folder


def npy_stacks(folder: Path) -> Path:
    for word in WORDS:
        np.save(folder / f"{word}.npy", np.stack([sample[word] for sample in ON_DISK]))
    return folder


FOLDERS: list[Callable[[Path], Path]] = [
    hdf5_files, hdf5_groups, hdf5_stack, zarr_files, zarr_stack, npy_folders, npy_endings, npy_stacks,
]  # fmt: skip


def opened(path: str | Path) -> FieldSource:
    return open_fields(path, LAYOUTS, ("a", "b", "c"))


def drawn(step: int, position: int, sample: int) -> Transform:
    """Boxes from everywhere, of another place in each step."""
    return Compose((Roll(("depth",), (step,)), Flip(("width",)), Crop((step % 2, 0, 1), (5, 6, 4))))


def serve_fields(path: str, axes: dict[str, int], augment: bool, budget: int, spill: str | None) -> int:
    """Every batch of three epochs out of the store has the fields of the files; how many bytes have been sent."""
    plan, source = mw.Plan.uniform(**axes), opened(path)
    steps = [mw_batch(step) for step in range(3 * COUNT)]
    rank, size = dist.get_rank(), drawn(0, 0, 0).output_shape(SHAPE) if augment else SHAPE
    with Store(
        source,
        plan,
        steps.__getitem__,
        budget_bytes=budget,
        last=len(steps),
        spill=spill,
        augment=drawn if augment else None,
    ) as store:
        for batch in store:
            indices = steps[batch.step]
            rows, _, *spans = mw.interval((len(indices), 1, *size), plan, rank)
            for row, position in enumerate(range(len(indices))[rows]):
                whole = {name: torch.from_numpy(array) for name, array in expected(indices[position]).items()}
                for name, value in whole.items():
                    if source.fields[name].is_volume:
                        value = moved(value, batch.step) if augment else value
                        value = value[(..., *spans)]
                    assert torch.equal(batch[name][row], value), (rank, batch.step, name)
                    assert batch[name].dtype == source.fields[name].dtype
            assert set(batch.fields) == set(LAYOUTS)
            assert batch["parameters"].shape[0] == len(range(len(indices))[rows])
    return store.stats.sent_bytes


def moved(value: torch.Tensor, step: int) -> torch.Tensor:
    """What `drawn` says, by torch."""
    return value.roll(step, -3).flip(-1)[..., step % 2 : step % 2 + 5, :, 1:5]


def mw_batch(step: int) -> Sequence[int]:
    return [step % COUNT, (3 * step + 1) % COUNT]


def serve_fields_through_mpi(path: str, axes: dict[str, int]) -> None:
    """Batches out of a store of which threads read through MPI-IO."""
    plan, source = mw.Plan.uniform(**axes), open_fields(path, LAYOUTS, hdf5_driver="mpio")
    with Store(source, plan, mw_batch, budget_bytes=1 << 30, last=COUNT, workers=3) as store:
        for batch in store:
            rows, _, *spans = mw.interval((2, 1, *SHAPE), plan, dist.get_rank())
            for row, index in enumerate(mw_batch(batch.step)[rows]):
                want = torch.from_numpy(expected(index)["image"])[(..., *spans)]
                assert torch.equal(batch["image"][row], want)
