"""How much a rank of CosmoFlow sends when 8, 64 or 512 of them share one cube: planned, and counted in a real run.

Nothing is measured in seconds: bytes and messages are facts of the split. The plan is computed in this process for
every rank; `--count` trains one step on 8 local ranks and compares what they account for with their plan.

    python benchmarks/scaling.py                    # 512 cubed, fp32, one sample, split in one, two and three dims
    python benchmarks/scaling.py --edge 256 --dtype bf16
    python benchmarks/scaling.py --count            # 128 cubed on 8 ranks, about a minute
    unshare -rn sh -c "ip link set lo up; python benchmarks/scaling.py --wire"

The last does the same by messages and shows beside it what the loopback interface of a network of its own has carried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import meshwright as mw
from meshwright.models.cosmoflow import CosmoFlow
from meshwright.parallel.account import Totals, totals
from meshwright.parallel.transport import VARIABLE
from meshwright.plan.exchange import RankStep, Sent, planned, total
from meshwright.plan.layers import Network, layers_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPLITS = {  # ranks → depth × height × width
    8: [(8, 1, 1), (4, 2, 1), (2, 2, 2)],
    64: [(64, 1, 1), (8, 8, 1), (4, 4, 4)],
    512: [(512, 1, 1), (32, 16, 1), (8, 8, 8)],
}
COUNTED_EDGE = 128


def plan_of(parts: tuple[int, ...]) -> mw.Plan:
    return mw.Plan.uniform(**dict(zip(("depth", "height", "width"), parts, strict=True)))


def network(edge: int, dtype: torch.dtype) -> Network:
    with torch.device("meta"):
        model = CosmoFlow(edge).to(dtype)
        return layers_of(model, torch.empty((1, 4, edge, edge, edge), dtype=dtype))


def figures(steps: tuple[RankStep, ...]) -> dict[str, float]:
    """Of a step, forward and backward together; `halo` is in parts of the activations that ranks read of their own."""

    def windows(step: RankStep) -> Sent:
        return total(sent for e in step.exchanges if e.layer.taps for sent in (e.forward, e.backward))

    own = sum(
        e.elements * e.layer.itemsize * (1 + e.layer.trains_input)
        for step in steps
        for e in step.exchanges
        if e.layer.taps
    )
    sent = [windows(step) for step in steps]
    switch = [total(e.forward for e in step.exchanges if not e.layer.taps) for step in steps]
    return {
        "max_bytes": max(s.nbytes for s in sent),
        "mean_bytes": sum(s.nbytes for s in sent) / len(sent),
        "max_messages": max(s.messages for s in sent),
        "mean_messages": sum(s.messages for s in sent) / len(sent),
        "halo": sum(s.nbytes for s in sent) / own,
        "switch_bytes": max(s.nbytes for s in switch),
        "switch_messages": max(s.messages for s in switch),
        "gradient_bytes": max(step.reduction.nbytes for step in steps),
    }


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f}"


def plan_all(edge: int, dtype: str, console: Console) -> list[dict[str, Any]]:
    table = Table(title=f"CosmoFlow {edge}³, {dtype}, one sample: what a rank sends in a step, MiB and messages")
    for column in ("ranks", "depth × height × width"):
        table.add_column(column)
    for column in ("windows max", "mean", "messages max", "mean", "halo ÷ own", "switch", "messages", "gradients"):
        table.add_column(column, justify="right")
    layers, rows = network(edge, DTYPES[dtype]), []
    begin = time.perf_counter()
    for ranks, splits in SPLITS.items():
        for parts in splits:
            row = figures(planned(layers, plan_of(parts)))
            rows.append({"ranks": ranks, "split": parts, **row})
            table.add_row(
                str(ranks),
                " × ".join(map(str, parts)),
                mib(row["max_bytes"]),
                mib(row["mean_bytes"]),
                f"{row['max_messages']:.0f}",
                f"{row['mean_messages']:.1f}",
                f"{100 * row['halo']:.2f} %",
                mib(row["switch_bytes"]),
                f"{row['switch_messages']:.0f}",
                mib(row["gradient_bytes"]),
            )
        table.add_section()
    console.print(table)
    console.print(f"{sum(SPLITS) * 3} ranks planned in {time.perf_counter() - begin:.1f} s")
    return rows


def loopback() -> tuple[int, int]:
    """Bytes and packets that the loopback interface has carried since it is up, headers included; Linux only."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    fields = next(line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(fields[8]), int(fields[9])


def reading() -> tuple[Totals, tuple[int, int]]:
    """When all ranks have received all that was sent, and none has gone on."""
    dist.barrier()
    found = totals.copy(), loopback()
    dist.barrier()
    return found


def count(dtype: str, wire: bool) -> dict[tuple[int, ...], list[tuple[int, int, int, int]]]:
    """On each of 8 ranks, forward and backward: (bytes, messages) by the totals of the account, (bytes, packets) that
    the loopback interface carried for all of them."""
    if wire:
        os.environ[VARIABLE] = "messages"
    torch.set_num_threads(1)
    found = {}
    for parts in SPLITS[8]:
        plan, edge = plan_of(parts), COUNTED_EDGE
        torch.manual_seed(0)
        model = CosmoFlow(edge, keep=1.0).to(DTYPES[dtype], memory_format=torch.channels_last_3d)
        x = torch.randn((1, 4, edge, edge, edge), generator=torch.Generator().manual_seed(1))
        x = mw.shard(x.to(DTYPES[dtype], memory_format=torch.channels_last_3d), plan)
        model = mw.parallelize(model, plan, strict=True)
        model(x).square().mean().backward()
        readings = [reading()]
        loss = model(x).square().mean()
        readings.append(reading())
        loss.backward()
        readings.append(reading())
        found[parts] = [
            ((b - a).sent_bytes, (b - a).messages, after[0] - before[0], after[1] - before[1])
            for (a, before), (b, after) in pairwise(readings)
        ]
    return found


def count_all(dtype: str, wire: bool, console: Console) -> bool:
    """Whether 8 ranks accounted for exactly what was planned."""
    ranks = mw.launch(count, ranks=8, args=(dtype, wire), threads=1)
    layers, same = network(COUNTED_EDGE, DTYPES[dtype]), True
    table = Table(title=f"CosmoFlow {COUNTED_EDGE}³ on 8 ranks, {dtype}: bytes (messages) of all ranks in a step")
    for column in (
        "depth × height × width",
        "",
        "planned",
        "counted",
        "rank by rank",
        *(["loopback: bytes (packets)"] if wire else []),
    ):
        table.add_column(column)
    for parts in SPLITS[8]:
        steps = planned(layers, plan_of(parts))
        wanted = [(step.forward, step.backward.plus(step.reduction)) for step in steps]
        for way, name in enumerate(("forward", "backward")):
            pairs = [(step[way], Sent(*rank[parts][way][:2])) for step, rank in zip(wanted, ranks, strict=True)]
            sums = [total(side) for side in zip(*pairs, strict=True)]
            equal = all(a == b for a, b in pairs)
            same &= equal
            texts = [f"{s.nbytes:,} ({s.messages:,})" for s in sums]
            texts.append("equal" if equal else "[red]different")
            nbytes, packets = ranks[0][parts][way][2:]
            table.add_row(" × ".join(map(str, parts)), name, *texts, *[f"{nbytes:,} ({packets:,})"][: int(wire)])
    console.print(table)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, choices=[128, 256, 512], default=512)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--count", action="store_true", help=f"run {COUNTED_EDGE} cubed on 8 local ranks and compare")
    parser.add_argument("--wire", action="store_true", help="the same by messages, beside the loopback's own counter")
    parser.add_argument("--json", metavar="FILE", help="also write the planned figures there")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    assert all(math.prod(parts) == ranks for ranks, splits in SPLITS.items() for parts in splits)
    rows = plan_all(options.edge, options.dtype, console)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    if (options.count or options.wire) and not count_all(options.dtype, options.wire, console):
        sys.exit("the run did not send what was planned")


if __name__ == "__main__":
    main()
