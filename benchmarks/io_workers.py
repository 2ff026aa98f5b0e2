"""`workers`: do threads decode at the same time, would processes be faster, and do as many as are tuned hide reading?

`decoding` reads the same samples of each format with one thread, two threads and two processes, files in the page
cache. The processes are what a loader of processes comes down to: they stay, have opened every file before, and put
each part into memory that the parent shares. `hiding` trains for a while with samples that are all read for the first
time from .nii.gz: a step takes a multiple of what reading one takes, and is compared with the same step whose data are
there. All ways take turns in each round; figures are medians of paired ratios with a bootstrap interval.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import h5py
import nibabel
import numpy as np
import torch
import zarr
from spatial import ratio

import meshwright as mw
from meshwright.data.formats import open_array
from meshwright.data.source import Part
from meshwright.data.store import Store
from meshwright.data.volumes import Pairs, open_pairs

COUNT, HANDS, STEPS = 8, 2, 24
SLOW, FAST = 2.0, 0.75  # a step's time as a multiple of what reading its sample takes
KINDS = {"npy": "{}.npy", "nii.gz": "{}.nii.gz", "HDF5 gzip": "{}.h5::v", "Zarr zstd": "{}.zarr"}


def write(folder: str, edge: int) -> None:
    """The same int16 volumes in each format, and labels for the .nii.gz ones."""
    draw, chunks = np.random.default_rng(0), (-(-edge // 4), -(-edge // 2), edge)
    for i in range(COUNT):
        smooth = np.linspace(-900, 900, edge)[:, None, None]
        whole = (smooth + draw.normal(0, 30, (edge,) * 3)).astype(np.int16)
        label = np.repeat(draw.integers(0, 3, (edge, 1, 1), np.uint8), edge * edge).reshape(whole.shape)
        np.save(f"{folder}/{i}.npy", whole)
        nibabel.save(nibabel.Nifti1Image(whole.T, np.eye(4)), f"{folder}/{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.T, np.eye(4)), f"{folder}/{i}_label.nii.gz")
        with h5py.File(f"{folder}/{i}.h5", "w") as file:
            file.create_dataset("v", data=whole, chunks=chunks, compression="gzip", shuffle=True)
        zarr.create_array(f"{folder}/{i}.zarr", data=whole, chunks=chunks, overwrite=True)


_opened = functools.cache(open_array)  # once in each process, as a source does


def _read(where: str) -> Any:
    array = _opened(where)
    return array.read([slice(0, size) for size in array.shape])[0]


def _by_library(where: str) -> Any:
    path, _, name = where.partition("::")
    with h5py.File(path) as file:
        return file[name][:]


def _shared(job: tuple[str, str]) -> None:
    """In another process: read, and leave it where the parent finds it."""
    where, name = job
    values = _read(where)
    memory = SharedMemory(name)
    np.ndarray(values.shape, values.dtype, memory.buf)[...] = values
    memory.close()


def _timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after one round that does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(-1, rounds):
        for way, work in ways.items():
            taken_s = _timed(work)
            if turn >= 0:
                seconds[way].append(taken_s)
    return seconds


def decoding(folder: str, rounds: int) -> dict[str, float]:
    print(f"\nworkers, decoding: {COUNT} samples, page cache warm, {rounds} rounds; ms a sample, and how much faster")
    print(
        f"  {'':12s}{'1 thread':>10s}{'2 threads ÷':>24s}{'2 processes ÷ 2 threads':>28s}{'library, 2 threads ÷':>28s}"
    )
    figures: dict[str, float] = {}
    room = [SharedMemory(create=True, size=_read(f"{folder}/0.npy").nbytes) for _ in range(COUNT)]
    context = multiprocessing.get_context("forkserver")
    with ThreadPoolExecutor(HANDS) as threads, ProcessPoolExecutor(HANDS, context) as processes:
        for kind, pattern in KINDS.items():
            files = [f"{folder}/{pattern.format(i)}" for i in range(COUNT)]
            jobs = [(file, memory.name) for file, memory in zip(files, room, strict=True)]
            ways: dict[str, Callable[[], object]] = {
                "one": lambda files=files: [_read(file) for file in files],
                "threads": lambda files=files: list(threads.map(_read, files)),
                "processes": lambda jobs=jobs: list(processes.map(_shared, jobs)),
            }
            if kind == "HDF5 gzip":
                ways["library"] = lambda files=files: list(threads.map(_by_library, files))
            seconds = _in_turn(ways, rounds)
            cells = f"{1e3 * sorted(seconds['one'])[rounds // 2] / COUNT:10.2f}"
            compared = {"threads": ("one", "threads", 24), "processes": ("threads", "processes", 28)}
            compared |= {"library": ("one", "library", 28)} if "library" in ways else {}
            for name, (above, below, width) in compared.items():
                middle, low, high = ratio(seconds[above], seconds[below])
                figures[f"workers, {kind}: {name}"] = middle
                cells += f"{f'{middle:.2f} [{low:.2f}, {high:.2f}]':>{width}s}"
            print(f"  {kind:12s}{cells}")
    for memory in room:
        memory.close()
        memory.unlink()
    return figures


class Fresh:
    """As many samples as there are steps, each read once: `Pairs` over and over."""

    def __init__(self, source: Pairs) -> None:
        self.source, self.fields = source, source.fields
        self.names = tuple(map(str, range(STEPS)))

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.source.shape(index % COUNT)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        return self.source.read(index % COUNT, spans)


def hiding(folder: str, rounds: int) -> dict[str, float]:
    names = (f"{folder}/[0-9].nii.gz", f"{folder}/*_label.nii.gz")
    source = Fresh(open_pairs(*names, ("a", "b", "c"), intensity=(12.0, 1000.0)))
    box = [slice(0, size) for size in source.shape(0)]
    read_s = sorted(_timed(lambda: source.read(0, box)) for _ in range(9))[4]
    matrix = torch.randn(192, 192)
    once_s = sorted(_timed(lambda: [torch.mm(matrix, matrix) for _ in range(20)]) for _ in range(9))[4] / 20
    print(f"\nworkers, hiding: {STEPS} samples read for the first time, {1e3 * read_s:.1f} ms each, {rounds} rounds")
    print(
        f"  {'step ÷ reading':16s}{'reads in its own thread':>28s}{'1 thread ahead':>24s}{'tuned':>24s}{'threads':>10s}"
    )
    figures: dict[str, float] = {}
    for factor in (SLOW, FAST):
        products = max(1, round(factor * read_s / once_s))

        def compute(part: Any, products: int = products) -> None:
            for _ in range(products):
                torch.mm(matrix, matrix)
            assert part["image"].numel()

        chosen = 0

        def ahead(workers: int | None, compute: Callable[[Any], None] = compute) -> None:
            nonlocal chosen
            with Store(
                source, mw.Plan.uniform(), lambda step: [step], budget_bytes=4 << 30, last=STEPS, workers=workers
            ) as store:
                for batch in store:
                    compute(batch)
                chosen = store.workers

        part = source.read(0, box)
        ways: dict[str, Callable[[], object]] = {
            "resident": lambda compute=compute, part=part: [compute(part) for _ in range(STEPS)],
            "own": lambda compute=compute: [compute(source.read(step, box)) for step in range(STEPS)],
            "one": lambda ahead=ahead: ahead(1),
            "tuned": lambda ahead=ahead: ahead(None),
        }
        seconds = _in_turn(ways, rounds)
        cells = ""
        for way, width in (("own", 28), ("one", 24), ("tuned", 24)):
            middle, low, high = ratio(seconds[way], seconds["resident"])
            figures[f"workers, step of {factor} × reading, {way}: with data / resident"] = middle
            cells += f"{f'{middle:.2f} [{low:.2f}, {high:.2f}]':>{width}s}"
        print(f"  {factor:<16.2f}{cells}{chosen:10d}")
    return figures


def workers(folder: str, edge: int, rounds: int) -> dict[str, float]:
    """Print both tables; returns their figures."""
    torch.set_num_threads(1)
    write(folder, edge)
    return decoding(folder, rounds) | hiding(folder, rounds)
