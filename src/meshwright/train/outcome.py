"""What a run says about itself besides its steps: how it began, what it went on from, how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meshwright.checkpoint.format import Checkpoint
from meshwright.cluster import agree
from meshwright.cluster.machine import describe
from meshwright.data.source import ReadStats
from meshwright.parallel.apply import report
from meshwright.plan.plan import interval
from meshwright.train import memory, rundir
from meshwright.train.feed import Feed
from meshwright.train.job import Job, is_folder
from meshwright.train.validate import fullest_planes

# settings that do not change what is computed
_FREE_TO_CHANGE = {"ranks", "threads", "run", "plan", "checkpoint", "data.memory_mib", "data.spill"}


def begin(path: Path, job: Job, step: int) -> None:
    """Write configuration, plan and machine; forget log lines after `step`, they are computed again (rank 0)."""
    rundir.write_text(path / rundir.CONFIG, job.config.yaml())
    job.plan.save(path / rundir.PLAN)
    rundir.write_json(path / "machine.json", describe())
    (path / rundir.SUMMARY).unlink(missing_ok=True)
    for name in (rundir.STEPS, rundir.VALIDATION):
        rundir.forget_after(path / name, step)


def resumed(saved: Path | None, checkpoint: Checkpoint | None, job: Job) -> list[str]:
    """Lines for the user: where the run goes on, and which settings make it differ from an uninterrupted one."""
    if saved is None or checkpoint is None:
        return ["no checkpoint was written before the run ended: starting from the first step"]
    config, plan = job.config, job.plan
    lines = [f"going on from {saved.name}, step {checkpoint.step} of {config.train.steps}"]
    old, new = dict(checkpoint.extra["config"]), config.as_dict()
    changed = [
        f"{key}: {before} → {after}"
        for section in new
        if section not in _FREE_TO_CHANGE
        for key, before, after in _differences(section, old.get(section), new[section])
        if key not in _FREE_TO_CHANGE
    ]
    if changed:
        lines.append(f"other settings than before, so not the run that was interrupted: {'; '.join(changed)}")
    if (before := checkpoint.extra.get("samples", job.samples)) != job.samples:
        lines.append(
            f"other samples than before: {before}, now {job.samples}: the order is another one, so in this epoch some "
            "may come twice and others not at all"
        )
    if checkpoint.extra["plan"] != plan.as_dict():
        lines.append(f"another plan than before ({plan}): equal within rounding, not to the bit")
    return lines


def left_out(job: Job) -> list[str]:
    """Lines for the user: how many samples `data.on_bad` = skip has left out, and why."""
    reasons = all_left_out(job)
    if not reasons:
        return []
    kept = len(job.train.names) + len(job.validation.names) - (len(reasons) - len(job.bad))
    return [f"data.on_bad = skip: {len(reasons)} left out, {kept} samples kept", *(f"  {text}" for text in reasons)]


def all_left_out(job: Job) -> list[str]:
    """Why samples were left out: before the run, and while it read. The same number on all ranks."""
    counted = (job.reads, job.held_reads)
    return [*job.bad, *(text for reads in counted if reads is not None for text in reads.left_out.values())]


def _differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for name in new for found in _differences(f"{key}.{name}", old.get(name), new[name])]
    return [] if old == new else [(key, old, new)]


def finish(path: Path, job: Job, feed: Feed, step: int, resident: int, total_s: float) -> None:
    """Planes, layers, ranks and the summary. Collective; rank 0 writes."""
    planes = fullest_planes(job)
    ranks, reading = _ranks(job, feed, resident), _reading(job)
    if job.rank > 0:
        return
    rundir.write_arrays(path / "slices.npz", planes)
    rundir.write_json(path / "layers.json", report(job.model))
    rundir.write_json(path / "ranks.json", ranks)
    rundir.write_json(path / "reading.json", reading)
    config, steps = job.config, rundir.records(path / rundir.STEPS)
    summary = {
        "finished": True,
        "steps": step,
        "train_s": sum(record["step_s"] for record in steps),
        # a run that goes on may have begun before these were written
        "wait_s": sum(record.get("wait_s", 0.0) for record in steps),
        "loaders": max((record.get("loaders", 0) for record in steps), default=0),
        "total_s": total_s,
        "dice": rundir.records(path / rundir.VALIDATION)[-1]["dice"],
        "classes": list(job.train.classes),
        "ranks": job.plan.ranks,
        "threads_per_rank": torch.get_num_threads(),
        "precision": config.train.precision,
        "left_out": len(all_left_out(job)),
        "read_bytes": sum(row["read_bytes"] for row in reading),
        "ideal_read_bytes": sum(row["ideal_read_bytes"] for row in reading),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "resolution_mm": float(config.data.resolution_mm) if not is_folder(config) else None,
        "fold": config.data.fold if not is_folder(config) else None,
    }
    rundir.write_json(path / rundir.SUMMARY, summary)


def _ranks(job: Job, feed: Feed, resident: int) -> list[dict[str, Any]]:
    """One record per rank, of the first training volume; collective."""
    names = ("peak_bytes", "state_bytes", "ideal_bytes", "part_bytes", "read_bytes", "ideal_read_bytes")
    data = feed.held
    own = (
        memory.peak_bytes(job.device),
        resident,
        data.ideal_part_bytes,
        data.part_bytes,
        data.read_bytes,
        data.ideal_read_bytes,
    )
    shape = (1, 1, *job.train.shape(0))
    return [
        {
            "rank": rank,
            "interval": [[span.start, span.stop] for span in interval(shape, job.plan, rank)[2:]],
            **dict(zip(names, values, strict=True)),
        }
        for rank, values in enumerate(agree.gather(own))
    ]


def _reading(job: Job) -> list[dict[str, int]]:
    """One record per epoch and rank, of the epochs in which some rank read training data; collective."""
    epochs = sorted(job.reading)
    most = agree.largest(len(epochs))
    known = {epoch for row in agree.gather([*epochs, *[0] * (most - len(epochs))]) for epoch in row if epoch > 0}
    found = []
    for epoch in sorted(known):
        spent = job.reading.get(epoch, ReadStats())
        rows = agree.gather((spent.read_bytes, spent.ideal_read_bytes, spent.shared_bytes))
        names = ("read_bytes", "ideal_read_bytes", "shared_bytes")
        found += [{"epoch": epoch, "rank": rank, **dict(zip(names, row, strict=True))} for rank, row in enumerate(rows)]
    return found
