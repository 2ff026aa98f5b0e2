"""`formats`: bytes read ÷ bytes of the parts, for each format and plan, counted by the readers and by the kernel.

    counted   what the reader says it has decoded: what the claim is about
    calls     what the process has read by system calls (`rchar` of /proc/self/io): headers and indexes too, compressed
              bytes of compressed files, and for .nii.gz the boxes that are taken from the copy
    disk      what came from the disk for it (`read_bytes` of /proc/self/io): whole pages and what is read ahead of a
              reader; 0 where the page cache was warm

All are sums over the ranks of the plan. The chunks are those that `meshwright data convert` makes for the plan, unless
the row says otherwise: a third of an edge ends nowhere near a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import nibabel
import numpy as np
import torch.distributed as dist
import zarr
from io_pages import forget, said, taken

import meshwright as mw
from meshwright.data.arrays import sizes
from meshwright.data.convert import chunks_for
from meshwright.data.formats import open_array

PLANS = {
    "d2": mw.Plan.uniform(depth=2),
    "h2": mw.Plan.uniform(height=2),
    "d2h2": mw.Plan.uniform(depth=2, height=2),
}
MOST_RANKS = 4
WARM = "warm"  # a first reading that counts for nothing: modules and codecs are loaded in it

Write = Callable[[Path, Any, mw.Plan], str]


class Kind(NamedTuple):
    """A format and what issue and documentation promise of it: the most bytes read ÷ ideal, None: nothing."""

    write: Write  # (folder, whole volume, plan) → what `open_array` opens
    most: float | None
    uneven: bool = False  # one position more along the dims that are cut


def _npy(folder: Path, whole: Any, plan: mw.Plan) -> str:
    np.save(folder / "v.npy", whole)
    return str(folder / "v.npy")


def _hdf5(name: str, chunks: Callable[[Any, mw.Plan], Any], **how: Any) -> Write:
    def write(folder: Path, whole: Any, plan: mw.Plan) -> str:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("v", data=whole, chunks=chunks(whole, plan), **how)
        return str(folder / f"{name}.h5::v")

    return write


def _zarr(name: str, chunks: Callable[[Any, mw.Plan], Any], shards: bool = False, **how: Any) -> Write:
    def write(folder: Path, whole: Any, plan: mw.Plan) -> str:
        inner, outer = chunks(whole, plan), None
        if shards:
            outer, inner = inner, tuple(size // 2 if size % 2 == 0 else size for size in inner)
        zarr.create_array(folder / f"{name}.zarr", data=whole, chunks=inner, shards=outer, **how)
        return str(folder / f"{name}.zarr")

    return write


def _nifti(ending: str) -> Write:
    def write(folder: Path, whole: Any, plan: mw.Plan) -> str:
        nibabel.save(nibabel.Nifti1Image(whole.T, np.eye(4)), folder / f"v{ending}")
        return str(folder / f"v{ending}")

    return write


def _at_cuts(whole: Any, plan: mw.Plan) -> tuple[int, ...]:
    return chunks_for(whole.shape, plan, whole.dtype.itemsize)


def _thirds(whole: Any, plan: mw.Plan) -> tuple[int, ...]:
    return tuple(-(-size // 3) for size in whole.shape)


def _none(whole: Any, plan: mw.Plan) -> None:
    return None


KINDS = {
    "npy": Kind(_npy, 1.0),
    "HDF5 contiguous": Kind(_hdf5("contiguous", _none), 1.0),
    "Zarr, chunks at the cuts": Kind(_zarr("cuts", _at_cuts, compressors=None), 1.0),
    "Zarr, shards at the cuts": Kind(_zarr("shards", _at_cuts, shards=True, compressors=None), 1.0),
    "Zarr zstd, chunks at the cuts": Kind(_zarr("zstd", _at_cuts), 1.0),
    "Zarr, chunks at the cuts, uneven": Kind(_zarr("uneven", _at_cuts, compressors=None), 1.1, uneven=True),
    "Zarr, chunks of a third": Kind(_zarr("thirds", _thirds, compressors=None), None),
    "HDF5, chunks at the cuts": Kind(_hdf5("cuts", _at_cuts), 1.1),
    "HDF5 gzip, chunks at the cuts": Kind(_hdf5("gzip", _at_cuts, compression="gzip", shuffle=True), 1.1),
    "HDF5, chunks at the cuts, uneven": Kind(_hdf5("uneven", _at_cuts), 1.1, uneven=True),
    "HDF5, chunks of a third": Kind(_hdf5("thirds", _thirds), None),
    "nii": Kind(_nifti(".nii"), 1.0),
    "nii.gz, decoded once a host": Kind(_nifti(".nii.gz"), 1.1),
}


class Counts(NamedTuple):
    """Bytes of one rank."""

    ideal: int = 0
    counted: int = 0
    calls: int = 0
    disk: int = 0
    shared: int = 0  # taken from the copy of a stream


class Job(NamedTuple):
    kind: str
    plan: str
    where: str


def write_all(folder: Path, edge: int) -> list[Job]:
    """Every format for every plan; before them a tiny one of each, which the ranks read first."""
    jobs = []
    for plan_name, plan in {WARM: PLANS["d2"], **PLANS}.items():
        (folder / plan_name).mkdir()
        size = 8 if plan_name == WARM else edge
        for name, kind in KINDS.items():
            more = [int(kind.uneven and axis in plan_name) for axis in "dhw"]
            shape = tuple(size + one for one in more)
            planes = np.linspace(-900, 900, shape[0])[:, None, None]  # smooth with noise, as scans are
            whole = (planes + np.random.default_rng(0).normal(0, 30, shape)).astype(np.int16)
            jobs.append(Job(name, plan_name, kind.write(folder / plan_name, whole, plan)))
    return jobs


def read_own(jobs: list[Job]) -> list[tuple[Counts, bool]]:
    """Runs on each of `MOST_RANKS` ranks: its part of each file is read; whether the page cache was emptied."""
    found, rank = [], dist.get_rank()
    for job in jobs:
        plan = PLANS.get(job.plan, PLANS["d2"])
        array = open_array(job.where)
        dist.barrier()
        cold = forget(array.path) if rank == 0 else False
        dist.barrier()
        counts = Counts()
        if rank < plan.ranks:
            box = mw.interval((1, 1, *array.shape), plan, rank)[2:]
            before = taken()
            counted, shared = array.prepare(box), 0
            for slab in array.slabs(box):
                counted += slab.read_bytes
                shared += slab.shared_bytes
            after = taken()
            ideal = math.prod(sizes(box)) * array.dtype.itemsize
            counts = Counts(ideal, counted, after.calls - before.calls, after.disk - before.disk, shared)
        found.append((counts, cold))
    return found


def formats(folder: str, edge: int) -> dict[str, float]:
    """Print the table; returns its ratios by name: "formats d2, npy: counted"."""
    jobs = write_all(Path(folder), edge)
    ranks = mw.launch(read_own, MOST_RANKS, (jobs,), threads=1)
    cold = all(was for _, was in ranks[0])
    print(f"\nformats: bytes read / bytes of the parts, int16, edge {edge}; {said(cold)}")
    plans = list(PLANS)
    print(f"  {'':34s}{'asked':8s}" + "".join(f"{f'{plan}: counted':>14s}{'calls':>8s}{'disk':>8s}" for plan in plans))
    figures: dict[str, float] = {}
    for name, kind in KINDS.items():
        cells, broken = "", False
        for plan in plans:
            at = jobs.index(next(job for job in jobs if (job.kind, job.plan) == (name, plan)))
            total = Counts(*map(sum, zip(*(rank[at][0] for rank in ranks), strict=True)))
            for what in ("counted", "calls", "disk", "shared"):
                figures[f"formats {plan}, {name}: {what}"] = getattr(total, what) / total.ideal
            ratios = [figures[f"formats {plan}, {name}: {what}"] for what in ("counted", "calls", "disk")]
            cells += f"{ratios[0]:14.3f}{ratios[1]:8.3f}{ratios[2]:8.3f}"
            broken |= kind.most is not None and ratios[0] > kind.most
        asked = "-" if kind.most is None else f"<= {kind.most:.2f}"
        print(f"  {name:34s}{asked:8s}{cells}{'   MORE THAN ASKED' if broken else ''}")
    return figures
