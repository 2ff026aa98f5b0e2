"""What ranks run in the tests of augmented training."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from meshwright.checkpoint import read
from meshwright.config import Config
from meshwright.plan.plan import Plan
from meshwright.train import state
from meshwright.train.batches import training_batch
from meshwright.train.job import batch_size, build
from meshwright.train.plans import resolve_plan

Batches = list[tuple[str, str, tuple[int, ...]]]


def batches(config: Config, steps: int, split: bool = True) -> Batches:
    """(digest of the image, digest of the label, shape) of the whole batch of each step, under the plan or in one."""
    job, _ = build(config, resolve_plan(config) if split else Plan.uniform(), split=split)
    found = []
    for step in range(1, steps + 1):
        batch = training_batch(job, step)
        image, label = state.whole(batch.image), state.whole(batch.label)
        found.append((digest(image), digest(label), tuple(image.shape)))
    return found


def samples(config: Config, run: str, steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The samples of these steps for a run that goes on from the last checkpoint of `run`."""
    job, _ = build(config, resolve_plan(config), read.newest(Path(run) / "checkpoints"))
    return [job.at(step).batch(batch_size(config, job.plan)) for step in steps]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
