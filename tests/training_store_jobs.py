"""What ranks run in the tests of training within a memory budget: counted in KiB, so that small volumes exceed it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from meshwright.config import Config
from meshwright.data.counted import Counted
from meshwright.data.folder import find_pairs
from meshwright.data.foreground import Boxes, Foreground
from meshwright.data.source import Part
from meshwright.data.store import Store
from meshwright.data.volumes import make_pairs
from meshwright.errors import DataError
from meshwright.train import feed, loop, outcome
from meshwright.train.job import Job


def train_within(settings: Config, run: str, resume: bool = False) -> dict[str, Any]:
    """Train with `data.memory_mib` in KiB; what the store says of it, and what is left once training has ended."""
    stores: list[Store] = []

    class Recorded(Store):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            stores.append(self)

    with patch.object(feed, "MIB", 1 << 10), patch.object(feed, "Store", Recorded):
        loop.run(settings, run, resume, True)
    (store,) = stores
    return {
        **asdict(store.cache_stats),
        **asdict(store.stats),
        "peak_bytes": store.peak_bytes,
        "threads": [name for name in (t.name for t in threading.enumerate()) if name.endswith(("-read", "-moves"))],
        "files": files_in(Path(run)),
    }


def train_while_files_break(settings: Config, run: str, number: int, breaks_at: int) -> dict[str, Any]:
    """`train_within` where rank 1 cannot read sample `number` any more from its read `breaks_at` on."""
    read, calls = Counted.read, [0]

    def breaking(self: Counted, index: int, spans: Sequence[slice]) -> Part:
        calls[0] += index == number
        if index == number and calls[0] >= breaks_at and dist.get_rank() == 1:
            source = self._source
            with patch.object(type(source), "read", side_effect=DataError("the disk is gone")):
                return read(self, index, spans)
        return read(self, index, spans)

    with patch.object(Counted, "read", breaking):
        found = train_within(settings, run)
    return {**found, "reads": calls[0]}


def foreground_found(folder: str) -> Boxes:
    """The boxes of the first pair, which one of the ranks looks for."""
    return Foreground(make_pairs(find_pairs(folder), ("0", "1", "2"))).boxes(0)


def files_in(run: Path) -> list[str]:
    """The files of a folder that this process holds open, with or without a name."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            where = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue  # that of the listing itself
        if where.startswith(f"{run}/"):
            found.append(where)
    return found


def train_without_label(settings: Config, run: str, number: int) -> list[str]:
    """Train where rank 1 cannot find the foreground of sample `number`; why samples were left out."""
    boxes, jobs = Foreground.boxes, list[Job]()

    def broken(self: Foreground, index: int) -> Boxes:
        if index == number and dist.get_rank() == 1:
            raise DataError("the disk is gone")
        return boxes(self, index)

    def noted(job: Job, done: int, path: Path) -> feed.Feed:
        jobs.append(job)
        return feed.Feed(job, done, path)

    with patch.object(Foreground, "boxes", broken), patch.object(loop, "Feed", noted):
        loop.run(settings, run, False, True)
    return outcome.all_left_out(jobs[0])
