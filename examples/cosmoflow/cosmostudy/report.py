"""The table, the laws and the plots of a study, written beside its trainings: report.md, errors.png, scatter.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cosmostudy import figure
from cosmostudy.laws import PARAMETERS, Errors, Key, Law, Value, with_bar
from cosmostudy.settings import Study
from cosmostudy.study import Finished, errors
from cosmostudy.training import trainings
from meshwright.report.units import bytes_text
from meshwright.train import rundir


def label(key: Key) -> str:
    """A size, with batch norm or without, as the table calls it."""
    return f"{key[0]}³" + ("" if key[1] else ", no batch norm")


@dataclass(frozen=True)
class Results:
    """All that is said about a study: its trainings, the errors of a linear fit by size, and the laws."""

    study: Study
    found: Sequence[Finished]
    linear: Mapping[int, Errors]
    said: Sequence[Law]

    @property
    def errors(self) -> dict[Key, Errors]:
        return errors(list(self.found))

    @property
    def rows(self) -> list[tuple[str, Errors]]:
        """A row of the table for each size, with batch norm, without, and of the linear fit."""
        named = [
            (f"{size}³" + ("" if bn else ", no batch norm"), one) for (size, bn), one in sorted(self.errors.items())
        ]
        return [*named, *((f"{size}³, linear fit", one) for size, one in sorted(self.linear.items()))]

    @property
    def about(self) -> str:
        """The study in a line."""
        data, train, seeds = self.study.data, self.study.train, self.study.seeds
        return (
            f"{data.train} universes to train, {data.test} held out, {data.voxels}³ voxels of "
            f"{data.box_mpc / data.voxels:g} Mpc/h; recipe {train.recipe}, {train.epochs} epochs, width "
            f"{self.study.network.width}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
            f"{len(self.found)} of {len(trainings(self.study))} trainings"
        )


def write(results: Results, out: Path) -> str:
    """Write all of it into `out`; returns the text for the console."""
    text = page(results, out)
    rundir.write_text(out / "report.md", text)
    rundir.write_json(out / "errors.json", numbers(results))
    figure.errors(out / "errors.png", results.errors, results.linear, results.said, results.about)
    figure.scatter(out / "scatter.png", results.found)
    return text + f"\n{out}/report.md, errors.png, scatter.png, errors.json\n"


def page(results: Results, out: Path) -> str:
    """The report as Markdown."""
    done = [one.training for one in results.found]
    missing = [str(one) for one in trainings(results.study) if one not in done]
    lines = [f"{results.about}.", ""]
    if missing:
        lines += [f"**Not finished: {', '.join(missing)}.**", ""]
    lines += ["Mean squared error of one cube (targets −1 … 1, variance 0.333), ± 95 %:", "", *_errors(results, "cube")]
    lines += ["", "Of the mean over a universe's cubes:", "", *_errors(results, "universe")]
    lines += ["", "What a training cost, mean over its seeds; bytes of one rank:", "", *_costs(results.found)]
    lines += ["", "Laws:", "", *(f"- {law}" for law in results.said), "", _machine(out)]
    return "\n".join(lines) + "\n"


def values(errors: Errors, what: str) -> list[Value]:
    """The mean of the parameters and each of them, with their bars; `what`: "cube" or "universe"."""
    found = getattr(errors, what)
    return [with_bar(found.mean(-1)), *(with_bar(found[..., at]) for at in range(len(PARAMETERS)))]


def numbers(results: Results) -> dict[str, Any]:
    """Every figure of the table, for other programs."""
    rows = [
        {"cubes": name, "seeds": len(one.cube)}
        | {what: [[value.mean, value.bar] for value in values(one, what)] for what in ("cube", "universe")}
        for name, one in results.rows
    ]
    laws = [
        {"law": law.text, "difference": [law.difference.mean, law.difference.bar], "holds": law.holds}
        for law in results.said
    ]
    return {"columns": ["mean", *PARAMETERS], "rows": rows, "laws": laws}


def _errors(results: Results, what: str) -> list[str]:
    lines = ["| cubes | seeds | mean | " + " | ".join(PARAMETERS) + " |", "|---|---|---|" + "---|" * len(PARAMETERS)]
    for name, one in results.rows:
        lines.append(f"| {name} | {len(one.cube)} | " + " | ".join(map(str, values(one, what))) + " |")
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
