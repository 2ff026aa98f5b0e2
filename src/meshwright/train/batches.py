"""The batches of a job: what a rank reads of its samples, what is drawn for them, and the tensors the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.data import augment
from meshwright.data.augmented import Augmented
from meshwright.data.foreground import Boxes
from meshwright.data.source import VolumeSource, batch_shape, read_batch
from meshwright.data.transforms import Compose
from meshwright.parallel.apply import from_local
from meshwright.plan.plan import interval
from meshwright.train import precision
from meshwright.train.job import Job, batch_size, is_folder, recipe
from meshwright.train.skipping import agreed, replaced


@dataclass(frozen=True)
class Batch:
    """image [N, C, D, H, W] and label [N, D, H, W] (int64), split as the plan says."""

    image: Tensor
    label: Tensor


def training_batch(job: Job, step: int, source: VolumeSource | None = None) -> Batch:
    """The augmented batch of `step` (from 1): a function of seed, step and samples seen, whatever the plan.

    It is read from `source` (None: `job.train`, which keeps what it has read). Collective with `data.on_bad` = skip.
    """
    source = job.train if source is None else source
    if job.reads is None or job.config.data.on_bad == "stop":
        return _training_batch(job, step, source)
    while (batch := agreed(job.reads, lambda: _training_batch(job, step, source), together=job.split)) is None:
        pass
    return batch


def _training_batch(job: Job, step: int, source: VolumeSource) -> Batch:
    config, at = job.config, job.at(step)
    indices: Sequence[int] = at.batch(batch_size(config, job.plan))
    if job.reads is not None:
        indices = replaced(indices, job.reads)
    if not recipe(config).is_nothing:
        transforms = [drawn(job, position, sample) for position, sample in enumerate(indices, at.seen)]
        source, indices = Augmented(source, indices, transforms, job.reads), range(len(indices))
    return augmented(job, step, load(job, source, indices))


def drawn(job: Job, position: int, sample: int, boxes: Boxes | None = None) -> Compose:
    """What is drawn for a training sample at `position` in the order; `boxes` None: its foreground is read."""
    train, config, share = job.train, job.config, job.config.augment.patch_foreground
    if boxes is None:
        boxes = foreground(job, sample) if share else ()
    shape, spacing_mm = train.shape(sample), train.spacing_mm(sample)
    return recipe(config).draw(config.seed, position, shape, boxes, share, spacing_mm)


def foreground(job: Job, sample: int) -> Boxes:
    """Where the label of a training sample has foreground. Raises `DataError`: the fault of the sample."""
    if job.foreground is None or job.reads is None:
        return ()
    with job.reads.blaming(sample):
        return job.foreground.boxes(sample)


def find_foreground(job: Job, samples: Sequence[int]) -> None:
    """Have the foreground of `samples` known, or the sample left out, on all ranks alike. Collective.

    For threads that read ahead, which cannot wait for what other ranks say of a label.
    """
    reads, first = job.reads, job.rank % max(1, len(samples))  # ranks of one host begin at labels of their own
    assert reads is not None
    assert job.foreground is not None

    def find() -> bool:
        for sample in (*samples[first:], *samples[:first]):
            if sample not in reads.left_out:
                foreground(job, sample)
        return True

    while agreed(reads, find, together=job.split) is None:
        pass
    for sample in reads.left_out:
        job.foreground.forget(sample)


def augmented(job: Job, step: int, batch: Batch) -> Batch:
    """`batch` with what is drawn for a step: flip, scale and shift."""
    config = job.config
    flip = config.augment.flip
    if flip is None:  # the template has no label that knows a side; the labels of others may
        flip = () if is_folder(config) else ("depth", "height")
    ranges = augment.Augmentation(flip, config.augment.scale, config.augment.shift)
    return Batch(*augment.apply(augment.draw(ranges, config.seed, step), batch.image, batch.label))


def held_out(job: Job, index: int) -> Batch | None:
    """Held-out sample `index`; None if it cannot be read and such samples are to be left out. Collective then."""
    if job.held_reads is None or job.config.data.on_bad == "stop":
        return _held_out(job, index)
    if index in job.held_reads.left_out:
        return None
    return agreed(job.held_reads, lambda: _held_out(job, index), together=job.split)


def _held_out(job: Job, index: int) -> Batch:
    fixed = recipe(job.config).fixed
    if not fixed.transforms:
        return load(job, job.validation, [index])
    return load(job, Augmented(job.validation, [index], [fixed]), [0])


def load(job: Job, source: VolumeSource, indices: Sequence[int]) -> Batch:
    """Samples `indices` of `source`: this rank reads its part of them, and the two tensors stand for the whole."""
    shape = batch_shape(source, indices)
    part = read_batch(source, indices, interval(shape, job.plan, job.rank))
    return placed(job, part.image, part.label, shape)


def placed(job: Job, image: Tensor, label: Tensor, shape: tuple[int, ...]) -> Batch:
    """This rank's part of a batch of `shape` = N, C, D, H, W as the tensors that the model takes."""
    memory = torch.channels_last_3d if job.config.train.channels_last else torch.contiguous_format
    image = image.to(job.device, precision.DTYPE[job.config.train.precision]).contiguous(memory_format=memory)
    label = label.to(job.device, torch.int64)
    if not job.split:
        return Batch(image, label)
    whole = (shape[0], *shape[2:])
    return Batch(from_local(image, job.plan, shape), from_local(label, job.plan, whole, layout="NDHW"))
