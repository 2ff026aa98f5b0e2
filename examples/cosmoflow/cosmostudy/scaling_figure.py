"""The scaling curves as the paper draws them: strong and weak scaling, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosmostudy.figure import COLOURS, INK, SOFT, pyplot

PARTS = (("compute_s", "compute"), ("exchange_s", "exchange"), ("reduction_s", "gradients"), ("data_s", "input"))
Row = Mapping[str, Any]


def draw(path: Path, rows: Sequence[Row], edge: int) -> None:
    """Samples a second against ranks, the step in parts, and bytes and memory of a rank."""
    plot = pyplot()
    from matplotlib.ticker import LogLocator, ScalarFormatter

    drawing, (speed, parts, sizes) = plot.subplots(1, 3, figsize=(11.5, 3.6))
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    for curve, colour in zip(curves, COLOURS, strict=False):
        timed = [row for row in rows if row["curve"] == curve and row["timed"]]
        ranks, rates = [row["ranks"] for row in timed], [row["batch"] / row["step_s"] for row in timed]
        speed.plot(ranks, rates, "o-", color=colour, label=curve)
        if timed:
            speed.plot(ranks, [rates[0] * n / ranks[0] for n in ranks], ":", color=colour, lw=1)
    speed.set(title=f"cubes of {edge}³ a second (dotted: ideal)", xlabel="ranks", ylim=(0, None), xticks=(1, 2))
    speed.legend(frameon=False, fontsize=8)
    timed = [row for row in rows if row["timed"]]
    floor = [0.0] * len(timed)
    for (key, name), colour in zip(PARTS, (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[2]), strict=True):
        values = [row[key] for row in timed]
        parts.bar(range(len(timed)), values, bottom=floor, color=colour, width=0.6, label=name)
        floor = [low + value for low, value in zip(floor, values, strict=True)]
    parts.set_xticks(range(len(timed)), [f"{row['curve']}\n{row['plan']}" for row in timed], fontsize=7)
    parts.set(title="seconds of a step", ylim=(0, 1.3 * max(floor, default=1)))
    parts.legend(frameon=False, fontsize=8, ncols=2)
    strong = [row for row in rows if row["curve"] == "strong"]
    ranks = [row["ranks"] for row in strong]
    memory = [row["step_bytes"] / 2**20 for row in strong]
    sizes.plot(ranks, memory, "o-", color=INK, label="memory of a step")
    sizes.plot(ranks, [memory[0] / n for n in ranks], ":", color=INK, lw=1, label="of one rank ÷ ranks")
    sent = [row for row in strong if row["ranks"] > 1]
    sizes.plot([r["ranks"] for r in sent], [r["sent_bytes"] / 2**20 for r in sent], "s--", color=SOFT, label="sent")
    sizes.set(title="MiB of a rank, strong scaling", xlabel="ranks in depth", xscale="log", yscale="log")
    sizes.set_xticks(ranks, ranks)
    sizes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    sizes.yaxis.set_major_formatter(ScalarFormatter())
    sizes.minorticks_off()
    sizes.legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path)
    plot.close(drawing)
