"""What ranks run in the tests of training within a memory budget: counted in KiB, so that small volumes exceed it."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from meshwright.config import Config
from meshwright.data.store import Store
from meshwright.train import feed, loop


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
