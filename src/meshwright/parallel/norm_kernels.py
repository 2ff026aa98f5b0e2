"""Local work of norms with statistics per channel: sums, and what follows from them.

torch's kernels sum in fp32, one value after the other where channels lie together: of 2²⁴ values around zero the
variance is 2.8 % low. So sums are taken of slabs, and those are added in fp64. Slabs also stay in the cache: an
expression over a whole volume in half precision copies it to fp32 and back, in fresh memory each time, ten times as
long as torch's own norm for 16 × 48 × 96 × 96. Inputs are [N, C, *space]; what is per channel is [C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from meshwright.parallel.kernels import memory_format
from meshwright.parallel.small import host, stacked, tensor

_backward = torch.ops.aten.native_batch_norm_backward.default
HALVES = (torch.bfloat16, torch.float16)
SLAB = 1 << 15  # elements of a channel
NEAR = 2.0  # standard deviations from zero to a mean, within which a sum of squares keeps the digits of the variance
DIGITS = 512.0  # the same times the root of the values that torch's kernel sums one by one, for a mean of five digits
FAR = 32.0  # the same, beyond which `x * scale + level` loses the digits of the result


def is_per_channel(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether torch's batch-norm kernels apply: statistics of dim 1 over all others (of one sample, over its space)."""
    over = list(dims)
    lone = x.shape[0] == 1 and over == list(range(2, x.ndim)) and x.is_contiguous(memory_format=memory_format(x))
    return x.ndim >= 2 and (over == [0, *range(2, x.ndim)] or lone)


def _slabs(x: torch.Tensor, *others: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Pieces of at most `SLAB` elements a channel, but at least one plane: whole samples, or a part of one. `others`
    have the shape of `x`.

    All of it where torch's kernel sums well: on accelerators, and in fp32 and fp64 channel by channel.
    """
    if x.device.type != "cpu" or (x.dtype not in HALVES and memory_format(x) is torch.contiguous_format):
        return [(x, *others)]
    cuts = _cuts(x.shape)
    return [tuple(t[cut] for t in (x, *others)) for cut in cuts] if cuts else [(x, *others)]


@lru_cache(maxsize=4096)
def _cuts(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], ...]:
    """Where slabs of a tensor lie; none if it is one."""
    samples, sample = shape[0], max(1, math.prod(shape[2:]))
    if samples * sample <= SLAB:
        return ()
    if sample <= SLAB or len(shape) < 3:
        each = max(1, SLAB // sample)
        return tuple((slice(first, first + each),) for first in range(0, samples, each))
    planes = max(1, SLAB // (sample // shape[2]))
    starts = itertools.product(range(samples), range(0, shape[2], planes))
    return tuple((slice(index, index + 1), slice(None), slice(first, first + planes)) for index, first in starts)


def _in_lines(x: torch.Tensor) -> bool:
    """Whether each channel of a sample lies in one piece, on the CPU: torch's kernels differ by up to ten there."""
    return x.device.type == "cpu" and memory_format(x) is torch.contiguous_format


def _is_far(moments: Any, deviations: float) -> bool:
    """Whether a mean is further from zero than so many standard deviations."""
    mean, variance = moments
    far = mean * mean > deviations**2 * variance
    return bool(far.any() if isinstance(far, torch.Tensor) else np.logical_or.reduce(far))  # its `any` is Python


def _mean(x: torch.Tensor) -> Any:
    """By torch's sum, which keeps its digits."""
    return stacked([host(x.sum([0, *range(2, x.ndim)]))])[0] / (x.numel() // x.shape[1])


def _mean_square(x: torch.Tensor) -> Any:
    """Of each channel that lies in one piece: torch's statistics take ten times as long (2²¹ elements in fp32)."""
    lines = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    roots = [torch.linalg.vector_norm(part, dim=2) for part in lines.split(SLAB, dim=2)]
    return (stacked([host(root) for root in roots]) ** 2).sum((0, 1)) / (x.numel() // x.shape[1])


def _slab_moments(x: torch.Tensor) -> Any:
    """Mean and biased variance, from those of slabs; the mean is good for few digits where it is far from zero."""
    near = spread = None
    if x.dtype in HALVES:  # wide running statistics make the results wide
        near, spread = (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    found, counts = [], []
    for (slab,) in _slabs(x):
        part = slab.contiguous(memory_format=memory_format(slab))
        mean, variance = torch.batch_norm_update_stats(part, near, spread, 0.0)
        found.append(stacked((host(mean), host(variance))))
        counts.append(part.numel() // x.shape[1])
    if len(found) == 1:
        return found[0]
    slabs, share = np.stack(found), np.array(counts)[:, None] / sum(counts)
    mean = (slabs[:, 0] * share).sum(0)
    return np.stack([mean, ((slabs[:, 1] + (slabs[:, 0] - mean) ** 2) * share).sum(0)])


def moments(x: torch.Tensor) -> tuple[Any, bool]:
    """Mean and biased variance [2, C] of each channel (fp64, see `small.py`), zeros of an empty part.

    And whether no mean is very far from zero, so that what is computed of the values themselves keeps its digits.
    """
    if not x.numel():
        return host(x.new_zeros((2, x.shape[1]), dtype=torch.float64)), True
    if x.dtype in HALVES or x.device.type != "cpu":
        return _slab_moments(x), True
    if not _in_lines(x):
        found = _slab_moments(x)
        if not _is_far(found, min(FAR, DIGITS / math.sqrt(min(SLAB, x.numel() // x.shape[1])))):
            return found, True
        found[0] = _mean(x)
        return found, not _is_far(found, FAR)
    mean = _mean(x)
    found = np.stack([mean, _mean_square(x) - mean * mean])
    if not _is_far(found, NEAR):
        return found, True
    found[1] = _mean_square(x - tensor(mean, x.dtype).view(1, -1, *(1 for _ in x.shape[2:])))
    return found, not _is_far(found, FAR)


def shifted(x: torch.Tensor, scale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`x * scale + level` in the place of `x`: by two operators where those that broadcast are slow (torch 2.13.0)."""
    if _in_lines(x):
        return x.mul_(scale).add_(level)
    return torch.addcmul(level, x, scale, out=x)


def gradient_sums(grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float) -> Any:
    """The sums of `grad` and of `grad * (x - mean) / sqrt(variance + eps)` [2, C] (fp64, see `small.py`)."""
    if not x.numel():
        return host(x.new_zeros((2, x.shape[1]), dtype=torch.float64))
    found = []
    for part, g in _slabs(x, grad):
        # torch 2.13.0 reads one of the two in the other's memory order where these differ (CPU)
        order = memory_format(part)
        part, g = part.contiguous(memory_format=order), g.contiguous(memory_format=order)
        _, product, total = _backward(g, part, None, mean, variance, None, None, False, eps, (False, True, True))
        found.append(stacked([host(total), host(product)]))
    return found[0] if len(found) == 1 else sum(found)


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, slope: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """`grad * scale + x * slope + level`; halves are computed in fp32 and rounded once: the parts cancel."""
    view = (1, -1, *(1,) * (x.ndim - 2))
    scale, slope, level = scale.view(view), slope.view(view), level.view(view)
    if x.dtype not in HALVES or x.device.type != "cpu":
        wide = x if x.dtype not in HALVES else x.float()
        return torch.addcmul(level, wide, slope).addcmul_(grad, scale).to(x.dtype)
    out = torch.empty_like(x)
    for part, g, into in _slabs(x, grad, out):
        into.copy_(shifted(part.float(), slope, level).addcmul_(g.float(), scale))
    return out
