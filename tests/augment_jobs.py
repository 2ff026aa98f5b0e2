"""What ranks run in the tests of augmented training."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from torch import Tensor

from meshwright.checkpoint import read
from meshwright.config import Config
from meshwright.plan.plan import Plan
from meshwright.train import state
from meshwright.train.batches import Batch, training_batch
from meshwright.train.feed import Feed
from meshwright.train.job import batch_size, build
from meshwright.train.plans import resolve_plan

Batches = list[tuple[str, str, tuple[int, ...]]]


def batches(config: Config, steps: int, split: bool = True) -> Batches:
    """(digest of the image, digest of the label, shape) of the whole batch of each step, under the plan or in one."""
    job, _ = build(config, resolve_plan(config) if split else Plan.uniform(), split=split)
    return [described(training_batch(job, step)) for step in range(1, steps + 1)]


def fed(config: Config, steps: int) -> Batches:
    """The same from what feeds the training, a store where there is a budget for one."""
    job, _ = build(config, resolve_plan(config))
    with tempfile.TemporaryDirectory() as folder, Feed(job, 0, Path(folder)) as feed:
        return [described(feed.batch(step)) for step in range(1, steps + 1)]


def described(batch: Batch) -> tuple[str, str, tuple[int, ...]]:
    image, label = state.whole(batch.image), state.whole(batch.label)
    return digest(image), digest(label), tuple(image.shape)


def samples(config: Config, run: str, steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The samples of these steps for a run that goes on from the last checkpoint of `run`."""
    job, _ = build(config, resolve_plan(config), read.newest(Path(run) / "checkpoints"))
    return [job.at(step).batch(batch_size(config, job.plan)) for step in steps]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
