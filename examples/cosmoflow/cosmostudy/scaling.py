"""Scaling curves of a training step: strong (one batch, more ranks) and weak (more ranks, as much more batch).

Times are measured where every rank has a core of its own; with more ranks than cores only what does not depend on the
clock is kept: bytes sent and the memory of a rank. For times glibc keeps its memory, as `run` asks of it; what a step
adds to the memory of a rank is seen only where it is given back, so it is measured apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import meshwright as mw
from cosmostudy.batches import Scale
from cosmostudy.settings import Split, Study
from cosmostudy.training import Trainer, Training
from meshwright.cluster import agree
from meshwright.cluster.machine import usable_cores
from meshwright.plan.plan import Plan
from meshwright.train import loop, memory, rundir

FILE = "scaling.json"
WARM_UP, STEPS = 2, 7  # steps that are not counted, and those whose median is
TIMES = ("step_s", "compute_s", "exchange_s", "reduction_s", "data_s")
BYTES = ("sent_bytes", "reduced_bytes")
MEMORY = ("step_bytes", "resident_bytes")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
LARGE_BYTES = 1 << 17  # blocks from here on have pages of their own: glibc's default


@dataclass(frozen=True)
class Point:
    """A plan and the cubes of a step, and the curve it belongs to."""

    curve: str
    plan: Plan
    batch: int


def points(batch: int) -> list[Point]:
    """Strong: `batch` cubes, each split in depth over 1, 2, 4, 8 ranks. Weak: `batch` / 2 cubes for each rank, the
    batch split; and hybrid, pairs of ranks that share `batch` cubes."""
    strong = [Point("strong", Plan.uniform(depth=ranks), batch) for ranks in (1, 2, 4, 8)]
    each = max(1, batch // 2)
    weak = [Point("weak", Plan.uniform(data=ranks), each * ranks) for ranks in (1, 2, 4, 8)]
    hybrid = [Point("weak, pairs", Plan.uniform(data=ranks // 2, depth=2), batch * ranks // 2) for ranks in (2, 4, 8)]
    return strong + weak + hybrid


def measured(study: Study, universes: str, scale: Scale, folder: str, clock: bool) -> dict[str, float]:
    """Medians over `STEPS` steps of this rank; memory is what a step adds at most: right unless for the `clock`.
    Collective."""
    if not clock:
        _give_memory_back()
    loop.deterministic()
    trainer = Trainer(study, Training(max(study.sizes), study.seeds[0]), universes, scale, Path(folder))
    for _ in range(WARM_UP):
        trainer.optimise()
    resident = memory.resident_bytes(trainer.device)
    memory.reset_peak(trainer.device)
    records = [trainer.optimise() for _ in range(STEPS)]
    found = {key: median(record[key] for record in records) for key in (*TIMES, *BYTES)}
    step = agree.largest(max(0, memory.peak_bytes(trainer.device) - resident))
    return {**found, "step_bytes": step, "resident_bytes": agree.largest(resident)}


def measure(study: Study, universes: str, scale: Scale, out: Path) -> list[dict[str, Any]]:
    """Every point; rank 0's times, the largest bytes of all ranks. Written to `scaling.json`."""
    rows = []
    for point in points(study.train.batch):
        timed = point.plan.ranks <= usable_cores()
        ranks = _launched(point, study, universes, scale, clock=False)
        clock = _launched(point, study, universes, scale, clock=True)[0] if timed else ranks[0]
        row: dict[str, Any] = {"curve": point.curve, "plan": str(point.plan), "ranks": point.plan.ranks}
        row |= {"batch": point.batch, "timed": timed}
        row |= {key: max(rank[key] for rank in ranks) for key in (*BYTES, *MEMORY)}
        row |= {key: clock[key] for key in TIMES}
        rows.append(row)
        print(line(row), flush=True)
    rundir.write_json(out / FILE, rows)
    return rows


def _launched(point: Point, study: Study, universes: str, scale: Scale, *, clock: bool) -> list[dict[str, float]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        point.plan.save(path)
        one = replace(
            study,
            train=replace(study.train, batch=point.batch),
            split=Split(point.plan.ranks, str(path), str(path)),
        )
        return mw.launch(measured, point.plan.ranks, (one, universes, scale, folder, clock), threads=1)


def _give_memory_back() -> None:
    """Large blocks go back to the system when they are freed, whatever the environment told glibc at the start."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(threshold, LARGE_BYTES)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table, for the console."""
    times = f"{row['step_s']:.3f} s a step" if row["timed"] else "not timed: more ranks than cores"
    bytes_ = f"a rank sends {row['sent_bytes'] / 2**20:.2f} MiB, a step adds {row['step_bytes'] / 2**20:.0f} MiB"
    return f"{row['curve']}: {row['plan']}, {row['batch']} cubes: {times}; {bytes_}"
