"""Dice, as a user would write it: plain torch, right for whole and split tensors, as shapes and sums are global."""

from __future__ import annotations

import torch
from torch import Tensor


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """[N, D, H, W] class numbers → [N, classes, D, H, W] bool, by comparison only: no scatter, nothing to exchange."""
    index = torch.arange(classes, device=target.device, dtype=target.dtype)
    return target.unsqueeze(1) == index.view(1, -1, *(1 for _ in target.shape[1:]))


def _all_but_channels(logits: Tensor) -> tuple[int, ...]:
    return tuple(dim for dim in range(logits.dim()) if dim != 1)


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 − mean over classes of the soft Dice overlap of softmax(logits) and `target`: a scalar in [0, 1].

    logits [N, C, D, H, W] of any floating dtype (computed in fp32 at least), target [N, D, H, W] of any integer dtype.
    The sums run over the whole batch and volume. Source: Milletari et al., "V-Net", 3DV 2016, with p instead of p² in
    the denominator.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    probability = wide.softmax(dim=1)
    truth = _one_hot(target, logits.shape[1]).to(probability.dtype)
    dims = _all_but_channels(logits)
    common, total = (probability * truth).sum(dims), (probability + truth).sum(dims)
    return 1 - (2 * common / total.clamp(min=1e-6)).mean()


def hard_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice per class [C] in [0, 1] of the most likely class: 2 |A ∩ B| / (|A| + |B|), 1 for a class in neither.

    Shapes as in `soft_dice`. The counts are whole numbers, so exact in any order; the result (fp32) has no gradient.
    """
    with torch.no_grad():
        classes, dims = logits.shape[1], _all_but_channels(logits)
        prediction = _one_hot(logits.argmax(dim=1), classes)
        truth = _one_hot(target, classes)
        common = (prediction & truth).sum(dims)
        total = prediction.sum(dims) + truth.sum(dims)
        return torch.where(total == 0, 1.0, 2 * common / total)
