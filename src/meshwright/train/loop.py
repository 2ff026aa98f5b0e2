"""The training job as each rank runs it: build, resume, steps, validation, checkpoints, and the run directory.

Same seed and plan give the same bits: every rank starts from the same weights, batches and augmentation are functions
of seed and step, the learning rate of the step, reductions have one fixed order, and torch is asked for deterministic
kernels. Another plan sums in another order: the same curve within rounding.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from meshwright.checkpoint import read, write
from meshwright.cluster import agree
from meshwright.config import Config
from meshwright.guard.inject import fault_point
from meshwright.parallel.account import totals
from meshwright.train import memory, outcome, rundir, signals, state
from meshwright.train.feed import Feed
from meshwright.train.job import Job, batch_size, build, note_reading
from meshwright.train.plans import resolve_plan
from meshwright.train.progress import Display
from meshwright.train.step import optimise
from meshwright.train.validate import validate


def run(config: Config, run_dir: str, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train on this rank until the last step, a signal, or an error; rank 0 writes `run_dir` (see `rundir.prepare`).

    Returns {"rank", "step", "stopped": number of the signal that ended it, or 0, "run": the directory}.
    """
    started_s = time.monotonic()
    plan = resolve_plan(config)
    agree.assert_same_on_all_ranks({"configuration": config.yaml(), "plan": str(plan)}, "the configuration")
    path = Path(agree.from_rank_0(run_dir))
    saved = read.newest(path / rundir.CHECKPOINTS) if resume else None
    deterministic()
    with signals.noted() as seen:
        job, checkpoint = build(config, plan, saved)
        first = step = checkpoint.step if checkpoint is not None else 0
        resident = memory.resident_bytes(job.device)
        memory.reset_peak(job.device)
        if job.rank == 0:
            outcome.begin(path, job, step)
        stopped = 0
        quiet = quiet or job.rank > 0
        with (
            Feed(job, step, path) as feed,
            Display(config.train.steps, step, job.train.classes, quiet=quiet) as display,
        ):
            for line in outcome.resumed(saved, checkpoint, job) if resume else []:
                display.say(line)
            said = 0
            while step < config.train.steps and not stopped:
                step += 1
                fault_point(step)
                record = _timed_step(job, feed, step)
                if (found := len(outcome.all_left_out(job))) > said:
                    said = found
                    for line in outcome.left_out(job):
                        display.say(line)
                if job.rank == 0:
                    rundir.append(path / rundir.STEPS, record)
                    display.step(record)
                if _due(step, config.train.validate_every, config.train.steps):
                    _validate(job, step, path, display)
                stopped = agree.largest(seen.number)
                if stopped or _due(step, config.checkpoint.every, config.train.steps):
                    save(job, step, path)
            if step == first and not stopped:  # nothing was left to do: it ended after its last checkpoint
                _validate(job, step, path, display)
        if not stopped:
            outcome.finish(path, job, feed, step, resident, time.monotonic() - started_s)
    return {"rank": job.rank, "step": step, "stopped": stopped, "run": str(path)}


def deterministic() -> None:
    """Ask torch for kernels that give the same bits each time; on a GPU some have none, torch then warns."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass


def save(job: Job, step: int, path: Path) -> None:
    """Write the checkpoint after `step`. Collective; rank 0 writes."""
    extra = {"config": job.config.as_dict(), "plan": job.plan.as_dict(), "seen": job.at(step + 1).seen}
    extra["samples"] = job.samples
    checkpoint = state.collect(job.model, job.optimizer, step, extra)
    if job.rank == 0:
        write.write(path / rundir.CHECKPOINTS, checkpoint, job.config.checkpoint.keep)


def _timed_step(job: Job, feed: Feed, step: int) -> dict[str, Any]:
    """One step and the line of `steps.jsonl` that describes it."""
    before, waited_s, start_s = totals.copy(), feed.waiting.wait_s, time.perf_counter()
    batch = feed.batch(step)
    note_reading(job, step)
    data_s = time.perf_counter() - start_s
    done = optimise(job, batch, step)
    step_s = time.perf_counter() - start_s
    spent = totals - before
    exchange_s = spent.exchange_post_s + spent.exchange_wait_s
    return {
        "step": step,
        "loss": done.loss,
        "lr": done.lr,
        "dice": list(done.dice),
        "grad_norm": done.grad_norm,
        "step_s": step_s,
        "compute_s": max(0.0, step_s - exchange_s - spent.reduction_s - data_s),
        "exchange_s": exchange_s,
        "reduction_s": spent.reduction_s,
        "data_s": data_s,
        "wait_s": feed.waiting.wait_s - waited_s,
        "loaders": feed.waiting.loaders,
        "sent_bytes": spent.sent_bytes,
        "reduced_bytes": spent.reduced_bytes,
        "messages": spent.messages,
        "samples_per_s": batch_size(job.config, job.plan) / step_s,
    }


def _validate(job: Job, step: int, path: Path, display: Display) -> None:
    loss, dice = validate(job)
    record = {"step": step, "loss": loss, "dice": list(dice)}
    if job.rank == 0:
        rundir.append(path / rundir.VALIDATION, record)
        display.validation(record)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
