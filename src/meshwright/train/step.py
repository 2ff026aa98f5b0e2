"""One step of optimisation: forward under autocast, loss, backward, clip, update. Plain PyTorch on split tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.config import TrainConfig
from meshwright.errors import NumericsError
from meshwright.models.losses import hard_dice, soft_dice
from meshwright.train import nonfinite, optim
from meshwright.train.batches import Batch
from meshwright.train.job import Job


@dataclass(frozen=True)
class Outcome:
    """What a step did, as global numbers: the loss, Dice of each class, the gradient norm before clipping."""

    loss: float
    dice: tuple[float, ...]
    grad_norm: float
    lr: float


def predict(job: Job, image: Tensor) -> Tensor:
    """Logits [N, classes, D, H, W], at least in fp32."""
    bf16 = job.config.train.precision == "bf16"
    with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
        logits = job.model(image)
    return logits.float() if bf16 else logits


def loss_of(train: TrainConfig, logits: Tensor, label: Tensor) -> Tensor:
    """`cross_entropy` × cross-entropy + `dice` × soft Dice loss: a scalar over the whole batch and volume."""
    return train.cross_entropy * F.cross_entropy(logits, label) + train.dice * soft_dice(logits, label)


def optimise(job: Job, batch: Batch, step: int) -> Outcome:
    """Step number `step` (from 1). Raises `NumericsError` if the loss or a gradient is not finite."""
    config = job.config
    lr = optim.learning_rate(config.optim, step - 1, config.train.steps)
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    job.optimizer.zero_grad(set_to_none=True)
    logits = predict(job, batch.image)
    loss = loss_of(config.train, logits, batch.label)
    value = loss.item()
    if not math.isfinite(value):
        if not job.split:
            raise NumericsError(
                f"step {step}: the loss of the reference on one rank is {value}; under the plan it is not"
            )
        nonfinite.stop(job.model, lambda: predict(job, batch.image), batch.image, step, value)
    loss.backward()
    norm = optim.clip(job.model, config.optim.clip_norm)
    job.optimizer.step()
    dice = hard_dice(logits.detach(), batch.label).tolist()
    return Outcome(value, tuple(dice), norm, lr)
