"""The optimiser, its learning rate as a pure function of the step, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from meshwright.config import OptimConfig
from meshwright.errors import NumericsError
from meshwright.parallel.tensor import is_mesh

_WARM_UP, _START, _END = 0.3, 1 / 25, 1e-4 / 25  # share of the steps; learning rate over its peak


def build(optim: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9."""
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(parameters, lr=optim.lr, weight_decay=optim.weight_decay, momentum=0.9)


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 ≤ `step` < `steps`.

    `one_cycle`: up from 1/25 of `lr` to `lr` in the first 30 % of the steps, down to 4·10⁻⁶ of it in the rest, both
    along half a cosine (Smith and Topin, "Super-Convergence", 2018; the numbers are those of torch's OneCycleLR).
    """
    if optim.schedule == "constant":
        return optim.lr
    top = _WARM_UP * steps - 1
    last = max(steps - 1, 1)
    if step <= top:
        return optim.lr * _cosine(_START, 1.0, step / max(top, 1e-9))
    return optim.lr * _cosine(1.0, _END, (step - top) / max(last - top, 1e-9))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def clip(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them); return the norm before.

    Raises `NumericsError` naming the first parameter whose gradient is not finite.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm([_whole(gradient) for gradient in gradients.values()]))
    if not math.isfinite(norm):
        bad = [name for name, gradient in gradients.items() if not torch.isfinite(_whole(gradient)).all()]
        where = f"first in {bad[0]!r}" if bad else "though each gradient is finite: their squares overflow"
        raise NumericsError(
            f"the norm of the gradients is {norm}, {where} ({len(bad)} of {len(gradients)} parameters); "
            "the loss was finite. Lower optim.lr or set train.precision=fp32."
        )
    if limit and norm > limit:
        with torch.no_grad():
            for gradient in gradients.values():
                gradient.mul_(limit / norm)
    return norm


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_mesh(tensor) else tensor
