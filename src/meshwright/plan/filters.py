"""When a convolution is split by filters instead of space: arithmetic of global shapes, the same on every rank.

Constants are explained in docs/constants.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshwright.plan.geometry import chunk

FEWEST_WEIGHTS = 1 << 19  # elements: below, what travels besides the halo takes longer than what is saved
WEIGHTS_PER_INPUT = 1  # elements of the weight ÷ those of the whole input, at least
STAY = 0.25  # the same of an input that is split by channels already
DIMS = (4,)  # of the activation: images


def filters_axis(
    shape: Sequence[int], weight_shape: Sequence[int], groups: int, split: Sequence[tuple[int, int, int]]
) -> int | None:
    """Which of the axes `split` (axis, dim, ranks; of more than one rank) a convolution of an input of `shape` is split
    along by filters; None if it stays split in space."""
    ends = [(axis, dim, ranks) for axis, dim, ranks in split if dim]
    if len(ends) != 1 or len(shape) not in DIMS or groups != 1 or 0 in shape:
        return None
    (axis, dim, ranks), elements = ends[0], math.prod(shape)
    fewest = STAY * elements if dim == 1 else max(FEWEST_WEIGHTS, WEIGHTS_PER_INPUT * elements)
    if math.prod(weight_shape) < fewest or not chunk(weight_shape[0], ranks, ranks - 1).size:
        return None
    return axis
