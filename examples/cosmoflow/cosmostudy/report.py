"""The table, the laws and the plots of a study, written beside its trainings: report.md, errors.png, scatter.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from cosmostudy import figure
from cosmostudy.laws import PARAMETERS, Errors, Key, Law, with_bar
from cosmostudy.settings import Study
from cosmostudy.study import Finished, errors
from cosmostudy.training import trainings
from meshwright.report.units import bytes_text
from meshwright.train import rundir

PAPER = {128: 0.0441, 256: 0.0169, 512: 0.00727}  # Oyama et al.: mean squared error, without batch norm
PAPER_NORMED = {512: 0.00445}  # with
VARIANCE = 1 / 3  # of a target, uniform in −1 … 1: the error of whoever always says 0


def write(study: Study, out: Path, found: Sequence[Finished], said: Sequence[Law]) -> str:
    """Write all of it into `out`; returns the text for the console."""
    by_key = errors(list(found))
    text = page(study, out, found, by_key, said)
    rundir.write_text(out / "report.md", text)
    rundir.write_json(out / "errors.json", numbers(by_key, said))
    figure.errors(out / "errors.png", by_key, said, PAPER, PAPER_NORMED, VARIANCE, figure_note(study, len(found)))
    figure.scatter(out / "scatter.png", found)
    return text + f"\n{out}/report.md, errors.png, scatter.png, errors.json\n"


def page(study: Study, out: Path, found: Sequence[Finished], by_key: dict[Key, Errors], said: Sequence[Law]) -> str:
    """The report as Markdown."""
    missing = [str(one) for one in trainings(study) if one not in [done.training for done in found]]
    lines = [f"{figure_note(study, len(found))}.", ""]
    if missing:
        lines += [f"**Not finished: {', '.join(missing)}.**", ""]
    lines += [
        "Mean squared error of a single cube (targets −1 … 1, variance 0.333), ± 95 %:",
        "",
        *_errors(by_key, "cube"),
    ]
    lines += ["", "Of the mean over a universe's cubes:", "", *_errors(by_key, "universe")]
    lines += ["", "What a training cost, mean over its seeds; bytes of one rank:", "", *_costs(found)]
    lines += ["", "Laws:", "", *(f"- {law}" for law in said), "", _machine(out)]
    return "\n".join(lines) + "\n"


def figure_note(study: Study, done: int) -> str:
    data, recipe = study.data, study.train.recipe
    seeds = f"seed{'s' * (len(study.seeds) > 1)} {', '.join(map(str, study.seeds))}"
    return (
        f"{data.train} universes to train, {data.test} held out, {data.voxels}³ voxels of "
        f"{data.box_mpc / data.voxels:g} Mpc/h; recipe {recipe}, {study.train.epochs} epochs, width "
        f"{study.network.width}, {seeds}; {done} trainings"
    )


def label(key: Key) -> str:
    size, batch_norm = key
    return f"{size}³" + ("" if batch_norm else ", no batch norm")


def numbers(by_key: dict[Key, Errors], said: Sequence[Law]) -> dict[str, Any]:
    """Every figure of the table, for other programs."""
    rows = []
    for key, one in sorted(by_key.items()):
        row: dict[str, Any] = {"size": key[0], "batch_norm": key[1], "seeds": len(one.cube)}
        for what in ("cube", "universe"):
            values = getattr(one, what)
            found = [with_bar(values.mean(-1)), *(with_bar(values[..., at]) for at in range(len(PARAMETERS)))]
            row[what] = [[value.mean, value.bar] for value in found]
        rows.append(row)
    laws = [
        {"law": law.text, "difference": [law.difference.mean, law.difference.bar], "holds": law.holds} for law in said
    ]
    return {"columns": ["mean", *PARAMETERS], "rows": rows, "laws": laws}


def _errors(by_key: dict[Key, Errors], what: str) -> list[str]:
    lines = ["| cubes | seeds | mean | " + " | ".join(PARAMETERS) + " |", "|---|---|---|" + "---|" * len(PARAMETERS)]
    for key, one in sorted(by_key.items()):
        values: np.ndarray[Any, Any] = getattr(one, what)
        cells = [with_bar(values.mean(-1)), *(with_bar(values[..., at]) for at in range(len(PARAMETERS)))]
        lines.append(f"| {label(key)} | {len(values)} | " + " | ".join(map(str, cells)) + " |")
    return lines


def _costs(found: Sequence[Finished]) -> list[str]:
    lines = [
        "| cubes | plan | steps × cubes | minutes | s a step | compute | exchange | gradients | input | peak memory | "
        "sent a step | of it gradients | read |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(one.training.size, one.training.batch_norm) for one in found})
    for key in keys:
        group = [one.summary for one in found if (one.training.size, one.training.batch_norm) == key]
        first, total = group[0], fmean(one["seconds"]["step"] for one in group)
        shares = [
            f"{fmean(one['seconds'][what] for one in group) / total:.0%}"
            for what in ("compute", "exchange", "reduction", "data")
        ]
        lines.append(
            f"| {label(key)} | {first['plan']} | {first['steps']} × {first['batch']} | {total / 60:.1f} | "
            f"{fmean(one['median_step_s'] for one in group):.2f} | {' | '.join(shares)} | "
            f"{bytes_text(max(one['peak_bytes'] for one in group))} | {bytes_text(first['sent_bytes_per_step'])} | "
            f"{bytes_text(first['reduced_bytes_per_step'])} | {bytes_text(first['read_bytes'])} |"
        )
    return lines


def _machine(out: Path) -> str:
    path = out / "machine.json"
    if not path.exists():
        return "Machine: not described yet."
    machine = json.loads(path.read_text(encoding="utf-8"))
    sets = ", ".join(machine["instruction_sets"])
    memory = bytes_text(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown memory"
    return f"Machine: {machine['cores']} cores of {machine['processor']} ({sets}), {memory}, torch {machine['torch']}."
