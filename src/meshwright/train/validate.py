"""The held-out part: loss, Dice, and the planes that the report shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.models.losses import hard_dice
from meshwright.parallel.tensor import is_mesh
from meshwright.plan.plan import interval
from meshwright.train.batches import held_out
from meshwright.train.job import Job
from meshwright.train.step import loss_of, predict

_DIRECTIONS = "dhw"


def validate(job: Job) -> tuple[float, tuple[float, ...]]:
    """Mean loss and mean Dice per class over the held-out volumes, each a global number."""
    losses, overlaps = [], []
    with _evaluating(job.model, own=job.config.train.validate_norm == "own"):
        for index in range(len(job.validation.names)):
            batch = held_out(job, index)
            if batch is None:
                continue
            logits = predict(job, batch.image)
            losses.append(loss_of(job.config.train, logits, batch.label).item())
            overlaps.append(hard_dice(logits, batch.label).tolist())
    return float(np.mean(losses)), tuple(map(float, np.mean(overlaps, axis=0)))


def fullest_planes(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """The planes of the first held-out volume with most labelled voxels, one per direction: `image_d`, `truth_d`,
    `prediction_d`, …, with the position `at` of each, the shape and the spacing. (The middle plane of a head lies
    in the gap between the hemispheres.)

    Collective. Each rank fills in what it owns and the planes are summed, so that no rank ever holds the volume.
    """
    with _evaluating(job.model, own=job.config.train.validate_norm == "own"):
        index, batch = next(
            (index, batch) for index in range(len(job.validation.names)) if (batch := held_out(job, index)) is not None
        )
        prediction = predict(job, batch.image).argmax(dim=1)
        if is_mesh(prediction) and is_mesh(batch.label):
            prediction = prediction.redistribute(placements=batch.label.placements)
    shape, spacing = job.validation.shape(index), job.validation.spacing_mm(index)
    spans = interval((1, 1, *shape), job.plan, job.rank)  # of the first channel
    planes: dict[str, np.ndarray[Any, Any]] = {"shape": np.array(shape), "spacing_mm": np.array(spacing)}
    at = [_fullest(batch.label, dim) for dim in range(3)]
    planes["at"] = np.array(at)
    volumes = {"image": _own(batch.image), "truth": _own(batch.label), "prediction": _own(prediction)}
    for name, part in volumes.items():
        part = part.reshape(-1, *part.shape[-3:])[:1]  # no sample where the plan gives this rank none
        for dim, letter in enumerate(_DIRECTIONS):
            plane = _plane(part, spans[2:], shape, dim, at[dim], owner=spans[0].stop > spans[0].start)
            planes[f"{name}_{letter}"] = plane.numpy().astype(np.float32 if name == "image" else np.uint8)
    return planes


def _fullest(label: Tensor, dim: int) -> int:
    """The position along spatial `dim` whose plane has most labelled voxels; the first among equals."""
    counts = (label[:1] > 0).sum(dim=[d for d in range(4) if d != dim + 1])
    return int(counts.argmax(dim=0))


def _plane(part: Tensor, spans: tuple[slice, ...], shape: tuple[int, ...], dim: int, at: int, *, owner: bool) -> Tensor:
    """Plane `at` along `dim` of the whole volume, from the parts of all ranks: each voxel has one owner."""
    rest = [d for d in range(3) if d != dim]
    plane = torch.zeros([shape[d] for d in rest])
    if owner and spans[dim].start <= at < spans[dim].stop:
        plane[spans[rest[0]], spans[rest[1]]] = part[0].select(dim, at - spans[dim].start).float().cpu()
    if dist.is_initialized():
        dist.all_reduce(plane)
    return plane


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_mesh(tensor) else tensor


@contextmanager
def _evaluating(model: nn.Module, own: bool) -> Iterator[None]:
    """Evaluation mode; `own`: batch norm takes mean and variance of the volume it sees, and keeps neither.

    A network that saw one volume a step was trained on such numbers; averages over the steps are none of them.
    """
    model.eval()
    norms = [module for module in model.modules() if own and isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked
        model.train()
