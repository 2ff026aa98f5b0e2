"""What data costs a training step: ratios measured in one run, one function per claim.

    python benchmarks/io.py                            # all claims
    python benchmarks/io.py resident --edge 96         # step time with data ÷ with the data already there
    python benchmarks/io.py rereading                  # batches from the store ÷ read from their files each time
    python benchmarks/io.py layouts                    # whole samples read and parts given away ÷ own parts read
    python benchmarks/io.py memory                     # memory of the store and its pipeline ÷ budget
    python benchmarks/io.py formats                    # bytes read ÷ bytes of the parts, each format (io_formats.py)
    python benchmarks/io.py loaders --rounds 9         # against DataLoader and MONAI's CacheDataset (io_loaders.py)
    python benchmarks/io.py workers --rounds 9         # threads, processes, and how many hide reading (io_workers.py)

The first four run on two one-thread ranks (`--ranks`), `formats` on four, `loaders` on one and on two, `workers` on
one. Files are written to a temporary folder first, so they lie in the page cache; `formats` and `loaders` take them out
of it again before each reading where the system can (`posix_fadvise`), the others with `--cold`. Each table says what
was done.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from io_formats import formats
from io_loaders import loaders
from io_pages import is_cold, said, taken
from io_samples import SAMPLES, Made, Npy, order_of, splits, write_files
from io_workers import workers
from spatial import barrier, ratio

import meshwright as mw
from meshwright.data.store import Store
from meshwright.data.volumes import open_pairs
from meshwright.models.small_unet import SmallUNet
from meshwright.train.memory import peak_bytes, reset_peak, resident_bytes

CPU = torch.device("cpu")


def resident(folder: str, edge: int, ranks: int, cold: bool, rounds: int) -> Iterator[tuple[str, float]]:
    """Step time with the store after the first epoch ÷ with one batch that is there already: the benchmark U-Net."""
    for name, plan in splits(ranks).items():
        size = ranks if name == "sample" else 1
        torch.manual_seed(0)
        model = SmallUNet(1, 3, base=16, levels=3, norm="none").to(memory_format=torch.channels_last_3d)
        model = mw.parallelize(model, plan, strict=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        epoch = SAMPLES // size

        def train(
            part: torch.Tensor, plan: mw.Plan = plan, size: int = size, model: Any = model, sgd: Any = optimizer
        ) -> None:
            x = mw.from_local(part.contiguous(memory_format=torch.channels_last_3d), plan, (size, 1, *(edge,) * 3))
            sgd.zero_grad(set_to_none=True)
            (model(x).float() ** 2).mean().backward()
            sgd.step()

        pairs = []
        with Store(
            Npy(folder), plan, order_of(SAMPLES, size), budget_bytes=4 << 30, last=epoch * (rounds + 1)
        ) as store:
            for _ in range(epoch):
                batch = store.batch(store.next_step)
                train(batch["image"])
            for _ in range(rounds):
                seconds = {"data": list[float](), "resident": list[float]()}
                for _ in range(epoch):  # in turns, so that the machine's mood is the same for both
                    for kind in seconds:
                        barrier()
                        begin_s = time.perf_counter()
                        train(store.batch(store.next_step)["image"] if kind == "data" else batch["image"])
                        seconds[kind].append(time.perf_counter() - begin_s)
                pairs.append(statistics.median(seconds["data"]) / statistics.median(seconds["resident"]))
            waited = store.stats.wait_s / store.stats.steps
        yield f"resident, {name}: step with data / resident", statistics.median(pairs)
        yield f"resident, {name}: wait per step, ms", 1e3 * waited


def rereading(folder: str, edge: int, ranks: int, cold: bool, rounds: int) -> Iterator[tuple[str, float]]:
    """An epoch of batches read from the files each time ÷ the same epoch from the store, nothing else computed."""
    known = (0.0, 1.0)
    pairs = open_pairs(f"{folder}/*-image.nii.gz", f"{folder}/*-label.nii.gz", ("a", "b", "c"), intensity=known)
    for kind, source in (("npy", Npy(folder)), ("nii.gz", pairs)):
        for name, plan in splits(ranks).items():
            size = ranks if name == "sample" else 1
            order, rank, epoch = order_of(SAMPLES, size), dist.get_rank(), SAMPLES // size
            rows, _, *spans = mw.interval((size, 1, *source.shape(0)), plan, rank)
            is_cold(cold, folder)
            barrier()
            begin_s = time.perf_counter()
            for step in range(epoch, 2 * epoch):
                torch.cat([source.read(index, spans)["image"] for index in order(step)[rows]])
            barrier()
            direct_s = time.perf_counter() - begin_s
            with Store(source, plan, order, budget_bytes=4 << 30, last=2 * epoch) as store:
                for step in range(epoch):
                    store.batch(step)
                barrier()
                begin_s = time.perf_counter()
                for step in range(epoch, 2 * epoch):
                    store.batch(step)
                barrier()
                store_s = time.perf_counter() - begin_s
            yield f"rereading {kind}, {name}: files / store", direct_s / store_s


def layouts(folder: str, edge: int, ranks: int, cold: bool, rounds: int) -> Iterator[tuple[str, float]]:
    """First epoch of a split sample: one rank reads it and gives parts away ÷ each rank reads its own part."""
    plan = splits(ranks)["depth"]
    readings = {"own part": plan, "sample-parallel": splits(ranks)["sample"]}
    seconds: dict[str, list[float]] = {name: [] for name in readings}
    from_disk = dict.fromkeys(readings, 0)
    source = open_pairs(f"{folder}/*-image.npy", f"{folder}/*-label.npy", ("a", "b", "c"), intensity=(12.0, 1000.0))
    turns = random.Random(0)
    for turn in range(-1, rounds):  # once to bring both to the same state of the page cache
        for name in turns.sample(list(readings), len(readings)):
            is_cold(cold, folder)
            before = taken().disk
            barrier()
            begin_s = time.perf_counter()
            with Store(
                source, plan, order_of(SAMPLES, 1), budget_bytes=4 << 30, last=SAMPLES, reading=readings[name]
            ) as store:
                for _ in store:
                    pass
            barrier()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin_s)
                from_disk[name] += taken().disk - before
    middle, low, high = ratio(seconds["sample-parallel"], seconds["own part"])
    yield "layouts: whole samples and scatter / own part", middle
    yield "layouts: low end of its interval", low
    yield "layouts: high end of its interval", high
    for name, values in seconds.items():
        yield f"layouts: {name}, ms a sample", 1e3 * statistics.median(values) / SAMPLES
        files = sum(file.stat().st_size for file in Path(folder).glob("*.npy"))
        yield f"layouts: {name}, bytes from disk / all files", from_disk[name] / (rounds * files)


def memory(folder: str, edge: int, ranks: int, cold: bool, rounds: int) -> Iterator[tuple[str, float]]:
    """The most memory that a rank gained while three epochs were served ÷ budget; two thirds of its share fit."""
    samples = 64
    for name, plan in splits(ranks).items():
        size, source = (ranks if name == "sample" else 1), Made(samples, edge)
        order, budget = order_of(samples, size), samples * edge**3 * 5 * 2 // (3 * ranks)
        with Store(source, plan, order, budget_bytes=budget, last=2, spill=folder) as store:
            list(store)  # what torch, threads and shared memory take once is no part of any budget
        before = resident_bytes(CPU)
        reset_peak(CPU)
        last = 3 * samples // size
        with Store(source, plan, order, budget_bytes=budget, last=last, spill=folder) as store:
            for batch in store:
                batch["image"].sum()
            gained = peak_bytes(CPU) - before
        yield f"memory, {name}: gained / budget", gained / budget
        yield f"memory, {name}: counted / budget", store.peak_bytes / budget
        yield f"memory, {name}: parts from disk an epoch", store.cache_stats.from_disk / 3


ON_RANKS = {claim.__name__: claim for claim in (resident, rereading, layouts, memory)}


def measured(name: str, folder: str, edge: int, ranks: int, cold: bool, rounds: int) -> list[tuple[str, float]]:
    """Runs on each rank."""
    torch.set_num_threads(1)
    return list(ON_RANKS[name](folder, edge, ranks, cold, rounds))


def on_ranks(name: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Print what each rank has measured; returns the worst of each figure."""
    write_files(folder, args.edge)
    print(f"\n{name}: {SAMPLES} samples, edge {args.edge}, {args.ranks} ranks; {said(is_cold(args.cold, folder))}")
    found = mw.launch(measured, args.ranks, (name, folder, args.edge, args.ranks, args.cold, args.rounds), threads=1)
    figures = {}
    for lines in zip(*found, strict=True):
        what, worst = lines[0][0], max(value for _, value in lines)
        figures[what] = worst
        print(f"  {what:52s} {worst:8.3f}  (each rank: {', '.join(f'{value:.3f}' for _, value in lines)})")
    return figures


CLAIMS: dict[str, Callable[[str, argparse.Namespace], dict[str, float]]] = {
    **{name: partial(on_ranks, name) for name in ON_RANKS},
    "formats": lambda folder, args: formats(folder, args.edge),
    "loaders": lambda folder, args: loaders(folder, args.edge, args.rounds),
    "workers": lambda folder, args: workers(folder, args.edge, args.rounds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all of them without")
    parser.add_argument("--claims", nargs="+", default=[], dest="more", metavar="CLAIM", help="the same")
    parser.add_argument("--edge", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=2, help="of the first four claims")
    parser.add_argument("--rounds", type=int, default=5, help="of all but `rereading`, `memory`, `formats`")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each reading, if permitted")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    names, figures = [*args.claims, *args.more] or list(CLAIMS), {}
    if unknown := [name for name in names if name not in CLAIMS]:
        parser.error(f"no claim {unknown[0]!r}; known: {', '.join(CLAIMS)}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            figures.update(CLAIMS[name](folder, args))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
