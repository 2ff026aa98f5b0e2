"""`meshwright doctor`: what this machine offers, what is missing, and whether local ranks can really meet."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from meshwright.cluster.cluster import Cluster
from meshwright.cluster.launch import launch
from meshwright.cluster.limits import exchange_timeout_s
from meshwright.cluster.machine import describe, missing
from meshwright.errors import MeshwrightError

GIB = 1 << 30
_PROBE_RANKS = 2


def doctor(console: Console | None = None) -> int:
    """Print the machine, what is missing and the outcome of a trial. Returns 0, or 1 when ranks cannot meet."""
    console = console or Console()
    console.print(_facts(Cluster.detect()))
    console.print(_gaps())
    if Cluster.detect().launcher != "local":
        console.print("Trial of local ranks: left out, this process already is a rank of a job")
        return 0
    begin_s = time.perf_counter()
    try:
        sums = launch(_probe, _PROBE_RANKS)
    except MeshwrightError as error:
        console.print(f"Trial of {_PROBE_RANKS} local ranks: failed\n{error}", style="red", markup=False)
        return 1
    expected = _PROBE_RANKS * (_PROBE_RANKS + 1) / 2
    if sums != [expected] * _PROBE_RANKS:
        console.print(f"Trial of {_PROBE_RANKS} local ranks: they summed to {sums}, not {expected:g}", style="red")
        return 1
    took_s = time.perf_counter() - begin_s
    console.print(f"Trial of {_PROBE_RANKS} local ranks: they met on loopback and summed a tensor in {took_s:.1f} s")
    return 0


def _probe() -> float:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.item()


def _facts(cluster: Cluster) -> Table:
    facts = describe()
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    physical = "" if facts["physical_cores"] is None else f" ({facts['physical_cores']} physical in the machine)"
    rows = {
        "processor": facts["processor"],
        "cores": f"{facts['cores']}{physical}",
        "instruction sets": ", ".join(facts["instruction_sets"]) or "unknown",
        "memory": f"{_gib(facts['memory_bytes'])}, {_gib(facts['memory_available_bytes'])} available",
        "accelerators": "\n".join(f"{gpu['name']}, {_gib(gpu['memory_bytes'])}" for gpu in facts["gpus"]) or "none",
        "torch": f"{facts['torch']}, {facts['threads']} threads",
        "backends": ", ".join(facts["backends"]),
        "python": f"{facts['python']} on {facts['platform']}",
        "launcher": str(cluster),
        "exchange limit": f"{exchange_timeout_s():g} s (MESHWRIGHT_TIMEOUT_S)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _gaps() -> Table | str:
    gaps = missing()
    if not gaps:
        return "Nothing is missing."
    table = Table("missing", "what for", "how to get it", title="Optional parts", title_justify="left")
    for gap in gaps:
        # brackets in `meshwright[nifti]` are text, not markup
        table.add_row(gap.what, gap.why, gap.how.replace("[", r"\["))
    return table


def _gib(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"
