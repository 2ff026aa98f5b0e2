"""Convolutions that torch 2.13.0 gets wrong on CPUs, and how they are asked for so that it does not.

Small parts are where its kernels read other memory, leave some unwritten, or crash; docs/constants.md says how that was
found. And torch pads alike on both sides: `Pad` finds the alike pad whose surplus outputs are dropped, and copies the
input only where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from meshwright.parallel.signature import Conv, Like, Pads


class Pad(NamedTuple):
    alike: int  # padding handed to the kernel
    before: int  # explicit zeros in front (negative: cut)
    after: int
    lead: int  # surplus outputs at the front

    @classmethod
    def of(cls, before: int, after: int, stride: int, size: int, reach: int) -> Pad:
        if after < 0 >= before and (size + before - reach) // stride == (size + before + after - reach) // stride:
            after = 0  # what no output reads need not be cut off, which is a copy where samples are several
        cut_before, cut_after = min(0, before), min(0, after)
        if max(before, after) > 0 and (size + cut_before + cut_after <= reach or max(before, after) >= reach):
            # torch's kernels go wrong or crash on volumes that are thinner than a padded kernel (2.13.0, CPU): fp32's
            # weight gradient of [2, 4, 3, 17, 5] with kernel 5 and padding 3, most of them in halves
            return cls(0, before, after, 0)
        before, after = max(0, before), max(0, after)
        if before >= after:
            return cls(before, cut_before, cut_after, 0)
        if (after - before) % stride == 0:
            return cls(after, cut_before, cut_after, (after - before) // stride)
        return cls(before, cut_before, cut_after + after - before, 0)


def spatial_pad(x: torch.Tensor, pads: Sequence[Pad]) -> torch.Tensor:
    """Explicit pads and cuts (cuts are views)."""
    for dim, pad in enumerate(pads, start=2):
        lo, hi = min(0, pad.before), min(0, pad.after)
        if lo or hi:
            x = x.narrow(dim, -lo, x.shape[dim] + lo + hi)
    flat = [max(0, value) for pad in reversed(pads) for value in (pad.before, pad.after)]
    return F.pad(x, flat) if any(flat) else x


def unreliable(x: Like, weight: Sequence[int], conv: Conv, outputs: Sequence[int]) -> bool:
    """Whether torch's half-precision convolution on CPUs may be wrong or leave memory unwritten (torch 2.13.0).

    Asked for the dtype and device of `x` and the shape of the weight. Found by drawing shapes (docs/constants.md):
    where a dim has both stride and dilation, where the last has a stride and one output, and on processors with AMX
    where it has kernel and stride 4 and in volumes whose depth has a stride, if that is not the stride of all or the
    filters are odd in number. These are computed in fp32 and rounded, wherever they run.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    filters, *_, width = weight
    if len(outputs) == 3 and conv.stride[0] > 1 and (len(set(conv.stride)) > 1 or filters % 2):
        return True
    skips = any(s > 1 and d > 1 for s, d in zip(conv.stride, conv.dilation, strict=True))
    return skips or (conv.stride[-1] > 1 and (outputs[-1] == 1 or width == 4 == conv.stride[-1]))


def tamed(
    shape: Sequence[int], weight: Sequence[int], conv: Conv, pads: Sequence[tuple[int, int]], out_sizes: Sequence[int]
) -> tuple[Conv, Pads]:
    """The same without strides where they do not matter: with a stride and one output along the last dim torch's
    kernels read other memory (2.13.0, CPUs with AVX512; fp32, two samples of one channel in channels_last)."""
    strides, ends = list(conv.stride), [tuple(pair) for pair in pads]
    for i, (size, k, dilation) in enumerate(zip(shape[2:], weight[2:], conv.dilation, strict=True)):
        after = dilation * (k - 1) + 1 - size - ends[i][0]  # of the only window
        if out_sizes[i] == 1 < strides[i] and after > -size:
            strides[i], ends[i] = 1, (ends[i][0], after)
    return conv._replace(stride=tuple(strides)), tuple(ends)  # type: ignore[arg-type]
