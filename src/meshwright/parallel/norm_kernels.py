"""Local work of batch norm (and of instance norm of one sample): sums and, in half precision on CPUs, all of it.

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


def is_per_channel(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether torch's batch-norm kernels apply: statistics of dim 1 over all others, on a part that is not empty."""
    over = list(dims)
    lone = x.shape[0] == 1 and over == list(range(2, x.ndim)) and x.is_contiguous(memory_format=memory_format(x))
    return x.ndim >= 2 and (over == [0, *range(2, x.ndim)] or lone) and x.numel() > 0


def is_half(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether `scaled` and `input_gradient` apply to `x`, too."""
    return x.dtype in HALVES and x.device.type == "cpu" and is_per_channel(x, dims)


def _slabs(x: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """Pieces of at most `SLAB` elements a channel, but at least one plane: whole samples, or a part of one.

    All of it where torch's kernel sums well: in fp32 and fp64, channel by channel.
    """
    if x.dtype not in HALVES and memory_format(x) is torch.contiguous_format:
        yield (slice(None),)
        return
    sample = math.prod(x.shape[2:])
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


def _line_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`moments` of values around zero: torch's statistics take ten times as long (2²¹ elements in fp32)."""
    lines = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    count = lines.shape[0] * lines.shape[2]
    mean = lines.sum((0, 2)).double() / count
    roots = [torch.linalg.vector_norm(part, dim=2) for part in lines.split(SLAB, dim=2)]
    squares = (roots[0] if len(roots) == 1 else torch.cat(roots)).double().square().sum(0)
    return mean, squares - count * mean * mean


def shifted(x: torch.Tensor, scale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`x * scale + level` in the place of `x`: by two operators where those that broadcast are slow (torch 2.13.0)."""
    if _in_lines(x):
        return x.mul_(scale).add_(level)
    return torch.addcmul(level, x, scale, out=x)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the sum of squared deviations (fp64); in fp32 and fp64 of values around zero."""
    if x.dtype not in HALVES and _in_lines(x):
        return _line_moments(x)
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
        return mean, variance * counts[0]
    means, variances = torch.stack(found).unbind(1)
    count = torch.tensor(counts, dtype=torch.float64, device=x.device).view(-1, 1)
    mean = (means * count).sum(0) / count.sum()
    return mean, ((variances + (means - mean) ** 2) * count).sum(0)


def scaled(x: torch.Tensor, near: torch.Tensor, scale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`(x - near) * scale + level`, computed in fp32 and rounded once."""
    return torch.batch_norm(x, scale, level, near, torch.ones_like(near), False, 0.0, 0.0, False)


def gradient_sums(grad: torch.Tensor, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """The sums of `grad` and of `grad * (x - near)`, stacked (fp64)."""
    found = []
    one, mask = torch.ones_like(near), [False, True, True]
    for slab in _slabs(x):
        part, g = x[slab], grad[slab]
        # torch 2.13.0 reads one of the two in the other's memory order where these differ (CPU)
        order = memory_format(part)
        part, g = part.contiguous(memory_format=order), g.contiguous(memory_format=order)
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            g, part, one, near, one, None, None, False, 0.0, mask
        )
        found.append(torch.stack([total, product]).double())
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def input_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    near: torch.Tensor,
    scale: torch.Tensor,
    slope: torch.Tensor,
    level: torch.Tensor,
) -> torch.Tensor:
    """`grad * scale + (x - near) * slope + level`, computed in fp32 and rounded once: the parts cancel."""
    view = [1, -1, *(1 for _ in x.shape[2:])]
    near, scale, slope, level = (t.view(view) for t in (near, scale, slope, level))
    out = torch.empty_like(x)
    for slab in _slabs(x):
        off = x[slab].float() - near
        out[slab].copy_(shifted(off, slope, level).addcmul_(grad[slab].float(), scale))
    return out
