"""Local work of norms with statistics per channel: sums, and what follows from them.

torch's kernels sum in fp32, one value after the other where channels lie together: of 2²⁴ values around zero the
variance is 2.8 % low. So sums are taken of slabs, and those are added in fp64. Slabs also stay in the cache: an
expression over a whole volume in half precision copies it to fp32 and back, in fresh memory each time, ten times as
long as torch's own norm for 16 × 48 × 96 × 96. Inputs are [N, C, *space]; what is per channel is [C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from meshwright.parallel.kernels import memory_format

HALVES = (torch.bfloat16, torch.float16)
SLAB = 1 << 15  # elements of a channel
NEAR = 2.0  # standard deviations from zero to a mean, within which a sum of squares keeps the digits of the variance
FAR = 32.0  # the same, beyond which `x * scale + level` loses the digits of the result


def is_per_channel(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether torch's batch-norm kernels apply: statistics of dim 1 over all others (of one sample, over its space)."""
    over = list(dims)
    lone = x.shape[0] == 1 and over == list(range(2, x.ndim)) and x.is_contiguous(memory_format=memory_format(x))
    return x.ndim >= 2 and (over == [0, *range(2, x.ndim)] or lone)


def _slabs(x: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """Pieces of at most `SLAB` elements a channel, but at least one plane: whole samples, or a part of one.

    All of it where torch's kernel sums well: on accelerators, and in fp32 and fp64 channel by channel.
    """
    if x.device.type != "cpu" or (x.dtype not in HALVES and memory_format(x) is torch.contiguous_format):
        yield (slice(None),)
        return
    sample = max(1, math.prod(x.shape[2:]))
    if sample <= SLAB or x.ndim < 3:
        for first in range(0, x.shape[0], max(1, SLAB // sample)):
            yield (slice(first, first + max(1, SLAB // sample)),)
        return
    planes = max(1, SLAB // (sample // x.shape[2]))
    for index, first in itertools.product(range(x.shape[0]), range(0, x.shape[2], planes)):
        yield slice(index, index + 1), slice(None), slice(first, first + planes)


def _in_lines(x: torch.Tensor) -> bool:
    """Whether each channel of a sample lies in one piece, on the CPU: torch's kernels differ by up to ten there."""
    return x.device.type == "cpu" and memory_format(x) is torch.contiguous_format


def _is_far(mean: torch.Tensor, variance: torch.Tensor, deviations: float) -> bool:
    """Whether a mean is further from zero than so many standard deviations."""
    return bool((mean * mean > deviations**2 * variance).any())


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each channel that lies in one piece: torch's statistics take ten times as long (2²¹ elements in fp32)."""
    lines = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    roots = [torch.linalg.vector_norm(part, dim=2) for part in lines.split(SLAB, dim=2)]
    return (roots[0] if len(roots) == 1 else torch.cat(roots)).double().square().sum(0) / (x.numel() // x.shape[1])


def _slab_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, from those of slabs; in fp32 and fp64 the mean is good for few digits."""
    # wide running statistics make the results wide
    near, spread = (x.new_zeros(x.shape[1], dtype=torch.float32) if x.dtype in HALVES else None for _ in range(2))
    found, counts = [], []
    for slab in _slabs(x):
        part = x[slab]
        part = part.contiguous(memory_format=memory_format(part))
        found.append(torch.stack(torch.batch_norm_update_stats(part, near, spread, 0.0)).double())
        counts.append(part.numel() // x.shape[1])
    if len(found) == 1:
        mean, variance = found[0].unbind()
        return mean, variance
    means, variances = torch.stack(found).unbind(1)
    share = torch.tensor(counts, dtype=torch.float64, device=x.device).view(-1, 1) / sum(counts)
    mean = (means * share).sum(0)
    return mean, ((variances + (means - mean) ** 2) * share).sum(0)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel (fp64) of a part that is not empty."""
    if x.dtype in HALVES or x.device.type != "cpu":
        return _slab_moments(x)
    over = [0, *range(2, x.ndim)]
    mean = x.sum(over).double() / (x.numel() // x.shape[1])  # torch's sum keeps its digits
    if not _in_lines(x):
        return mean, _slab_moments(x)[1]
    variance = _mean_square(x) - mean * mean
    if _is_far(mean, variance, NEAR):
        centred = x - mean.to(x.dtype).view(1, -1, *(1 for _ in x.shape[2:]))
        variance = _mean_square(centred)
    return mean, variance


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and biased variance (fp64), zeros of an empty part. None in fp32 and fp64 on the CPU where a mean is so far
    from zero that what is computed of the values themselves loses digits: they are to be centred first."""
    if not x.numel():
        mean, variance = x.new_zeros((2, x.shape[1]), dtype=torch.float64).unbind()
        return mean, variance
    mean, variance = moments(x)
    if x.dtype not in HALVES and x.device.type == "cpu" and _is_far(mean, variance, FAR):
        return None
    return mean, variance


def shifted(x: torch.Tensor, scale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`x * scale + level` in the place of `x`: by two operators where those that broadcast are slow (torch 2.13.0)."""
    if _in_lines(x):
        return x.mul_(scale).add_(level)
    return torch.addcmul(level, x, scale, out=x)


def gradient_sums(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """The sums of `grad` and of `grad * (x - mean) / sqrt(variance + eps)`, stacked (fp64)."""
    if not x.numel():
        return x.new_zeros((2, x.shape[1]), dtype=torch.float64)
    found = []
    for slab in _slabs(x):
        part, g = x[slab], grad[slab]
        # torch 2.13.0 reads one of the two in the other's memory order where these differ (CPU)
        order = memory_format(part)
        part, g = part.contiguous(memory_format=order), g.contiguous(memory_format=order)
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            g, part, None, mean, variance, None, None, False, eps, [False, True, True]
        )
        found.append(torch.stack([total, product]).double())
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def input_gradient(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, slope: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """`grad * scale + x * slope + level`; halves are computed in fp32 and rounded once: the parts cancel."""
    view = [1, -1, *(1 for _ in x.shape[2:])]
    scale, slope, level = (t.view(view) for t in (scale, slope, level))
    if x.dtype not in HALVES or x.device.type != "cpu":
        wide = x if x.dtype not in HALVES else x.float()
        return torch.addcmul(level, wide, slope).addcmul_(grad, scale).to(x.dtype)
    out = torch.empty_like(x)
    for slab in _slabs(x):
        part = shifted(x[slab].float(), slope, level)
        out[slab].copy_(part.addcmul_(grad[slab].float(), scale))
    return out
