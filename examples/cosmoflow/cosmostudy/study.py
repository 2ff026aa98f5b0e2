"""The study as a whole: universes, trainings one after the other, then what they say together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import meshwright as mw
from cosmostudy import training
from cosmostudy.batches import Scale
from cosmostudy.cubes import Cubes
from cosmostudy.laws import Errors, Key
from cosmostudy.progress import clock
from cosmostudy.settings import Study
from cosmostudy.training import PREDICTIONS, RESULT, Training, trainings
from generate import generate, missing_universes
from meshwright.cluster.cluster import Cluster
from meshwright.cluster.machine import describe, usable_cores
from meshwright.errors import ConfigError
from meshwright.train import rundir, signals
from universes import Settings

STUDY, SCALE, UNIVERSES, TRAININGS = "study.yaml", "scale.json", "universes", "trainings"


@dataclass(frozen=True)
class Finished:
    """A training that has ended: its summary, and its predictions [universes, cubes, 4] beside the truth."""

    training: Training
    summary: Mapping[str, Any]
    predicted: np.ndarray[Any, np.dtype[np.float64]]
    truth: np.ndarray[Any, np.dtype[np.float64]]


def prepare(study: Study, out: Path) -> str:
    """Make the folder of the study, or see that it is this study's, and the universes; returns their folder.

    Ranks that a launcher has started make no universes: make them before, and name them as `data.folder`.
    Raises `ConfigError` for that, and if another study is in `out`.
    """
    place = Cluster.detect()
    if place.launcher != "local" and study.data.folder is None:
        raise ConfigError(
            f"under {place.launcher} universes are made before: generate.py --out DIR --count "
            f"{study.data.count} --voxels {study.data.voxels} --box {study.data.box_mpc:g}, "
            "then --set data.folder=DIR"
        )
    out.mkdir(parents=True, exist_ok=True)
    own, path = study.yaml(), out / STUDY
    if path.exists() and path.read_text(encoding="utf-8") != own:
        raise ConfigError(f"{path} is another study: choose another --out, or the same settings to go on with it")
    if place.rank == 0:
        rundir.write_text(path, own)
    data = study.data
    if data.folder is not None:
        return data.folder
    folder = Path(universes_of(study, out))
    settings = Settings(
        seed=data.seed, count=data.count, voxels=data.voxels, box_mpc=data.box_mpc,
        particles=data.particles, lpt=data.lpt,
    )  # fmt: skip
    if missing := len(missing_universes(settings, folder)):
        print(f"universes: {missing} of {settings.count} are to be made", flush=True)
        start_s = time.monotonic()
        generate(settings, folder, data.workers or usable_cores())
        print(f"universes: made in {clock(time.monotonic() - start_s)}", flush=True)
    return str(folder)


def universes_of(study: Study, out: Path) -> str:
    """The folder with the universes of the study in `out`."""
    return study.data.folder or str(out / UNIVERSES)


def scale(study: Study, universes: str, out: Path) -> Scale:
    """How counts become inputs: measured once, then kept in the folder, so that a resumed study goes on alike."""
    path = out / SCALE
    if not path.exists():
        measured = Scale.measured(Cubes(universes, study.data.voxels, 0, study.data.train))
        rundir.write_json(path, {"mean": measured.mean, "deviation": measured.deviation})
    return Scale(**json.loads(path.read_text(encoding="utf-8")))


def train(study: Study, out: Path, universes: str, ranks_started: int | None = None) -> int:
    """Do the trainings that are not done; returns the signal that stopped them, or 0. Raises `RankError`."""
    todo, scaled = trainings(study), scale(study, universes, out)
    rundir.write_json(out / "machine.json", describe())
    start_s, done = time.monotonic(), 0
    left = [one for one in todo if not (out / TRAININGS / one.name / RESULT).exists()]
    for number, one in enumerate(todo, 1):
        if one not in left:
            continue
        about = f"[{number}/{len(todo)}] {one}"
        folder = str(out / TRAININGS / one.name)
        arguments = (study, one, universes, scaled, folder, about)
        plan = study.plan(one.size)
        with signals.passed_on() as seen:
            stopped = max(mw.launch(training.run, plan.ranks, arguments, threads=study.split.threads))
        if stopped or seen.number:
            return int(seen.number or stopped)
        done += 1
        spent_s = time.monotonic() - start_s
        summary = json.loads((out / TRAININGS / one.name / RESULT).read_text(encoding="utf-8"))
        errors = ", ".join(f"{error:.3f}" for error in summary["error"])
        rest = clock(spent_s / done * (len(left) - done))
        print(f"{about}: done, held-out errors {errors}; the study needs about {rest} more", flush=True)
    return 0


def finished(study: Study, out: Path) -> list[Finished]:
    """The trainings of the study that have ended."""
    found = []
    for one in trainings(study):
        path = out / TRAININGS / one.name
        if (path / RESULT).exists():
            summary = json.loads((path / RESULT).read_text(encoding="utf-8"))
            with np.load(path / PREDICTIONS, allow_pickle=False) as arrays:
                found.append(Finished(one, summary, arrays["predicted"], arrays["truth"]))
    return found


def errors(found: list[Finished]) -> dict[Key, Errors]:
    """By size and batch norm, all seeds together."""
    groups: dict[Key, list[Finished]] = {}
    for one in found:
        groups.setdefault((one.training.size, one.training.batch_norm), []).append(one)
    return {key: Errors.of([one.predicted for one in group], group[0].truth) for key, group in groups.items()}
