"""Patches of samples that are larger than the plan: where the patch of a place in the order lies, in global voxels.

A patch is a `Crop`, so it joins other transforms: put it last, and what is before it is computed with the true
surroundings of the patch and nowhere else. Several patches a sample: an epoch of samples · n places, sample p // n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from meshwright.data.chance import key, units
from meshwright.data.rearrange import Crop
from meshwright.data.transforms import Shape, sizes
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval

_STREAM = 0x70617431  # keeps these numbers apart from others drawn from the same seed


def draw(
    shape: Sequence[int],
    size: Sequence[int],
    seed: int,
    position: int,
    boxes: Sequence[Sequence[slice]] = (),
    share: float = 0.0,
) -> Crop:
    """The patch of `size` of a sample of global `shape`, for place `position` in the order of samples.

    All places where it fits are equally likely. With probability `share` it is centred, as far as it fits, on a voxel
    drawn from `boxes` (slices of D, H, W that hold the foreground), each voxel of each box equally likely; a sample
    without boxes is drawn from as if `share` were 0. Raises `DataError` for a patch larger than the sample.
    """
    shape, size = tuple(shape), tuple(size)
    _see(shape, size)
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: the probability of a foreground patch is between 0 and 1")
    chance, which, *places = units(key(_STREAM, seed, position), 2 + len(shape))
    foreground = [tuple(Interval(span.start, span.stop) for span in box) for box in boxes]
    voxels = [math.prod(sizes(box)) for box in foreground]
    if chance < share and sum(voxels) > 0:
        reach = list(itertools.accumulate(voxels))
        box = foreground[next(i for i, upto in enumerate(reach) if which * reach[-1] < upto)]
        centre = [span.lo + int(at * span.size) for at, span in zip(places, box, strict=True)]
        start = [min(max(c - s // 2, 0), n - s) for c, s, n in zip(centre, size, shape, strict=True)]
    else:
        start = [int(at * (n - s + 1)) for at, s, n in zip(places, size, shape, strict=True)]
    return Crop(tuple(start), size)


def tiles(shape: Sequence[int], size: Sequence[int]) -> tuple[Crop, ...]:
    """Patches that together hold every voxel, row by row; the last of a dim is moved back to fit, so it may overlap."""
    shape, size = tuple(shape), tuple(size)
    _see(shape, size)
    along = [[min(lo, n - s) for lo in range(0, n, s)] for n, s in zip(shape, size, strict=True)]
    return tuple(Crop(start, size) for start in itertools.product(*along))


def boxes_of(label: torch.Tensor, edge: int, background: int = 0) -> tuple[tuple[slice, ...], ...]:
    """The cells, `edge` voxels long, in which `label` (all of a sample's, [d, h, w]) has foreground; for `draw`.

    Each cell comes as the tight box of its foreground. To be computed once and kept beside the data.
    """
    found: list[tuple[slice, ...]] = []
    for start in itertools.product(*(range(0, n, edge) for n in label.shape)):
        where = (label[tuple(slice(lo, lo + edge) for lo in start)] != background).nonzero()
        if len(where):
            low, high = where.amin(0).tolist(), where.amax(0).tolist()
            found.append(tuple(slice(lo + a, lo + b + 1) for lo, a, b in zip(start, low, high, strict=True)))
    return tuple(found)


def _see(shape: Shape, size: Shape) -> None:
    if len(shape) != len(size) or any(s < 1 or s > n for s, n in zip(size, shape, strict=False)):
        raise DataError(f"a patch of {size} voxels does not fit into a sample of shape {shape}")
