"""Meshwright: train an unmodified `torch.nn.Module` on samples larger than one device, with the same result."""

import meshwright.report  # noqa: F401  (the room, before the function of the same name)
from meshwright import errors
from meshwright.cluster.cluster import Cluster
from meshwright.cluster.launch import launch
from meshwright.parallel.apply import from_local, parallelize, report, shard
from meshwright.parallel.exchange import window
from meshwright.plan.plan import Plan, interval
from meshwright.sync.reducer import no_sync

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "Plan",
    "errors",
    "from_local",
    "interval",
    "launch",
    "no_sync",
    "parallelize",
    "report",
    "shard",
    "window",
]
