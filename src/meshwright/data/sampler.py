"""Which samples a step trains on: a pure function of seed and step. Resuming needs no state, ranks never disagree."""

from __future__ import annotations

import numpy as np

_STREAM = 0x736D7031  # keeps these numbers apart from others drawn from the same seed


def order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of `count` samples in one epoch: each of them once."""
    return tuple(int(index) for index in np.random.default_rng((_STREAM, seed, epoch)).permutation(count))


def batch(seed: int, step: int, count: int, size: int = 1) -> tuple[int, ...]:
    """The `size` samples of `step` (from 0): the epochs' orders, one behind the other, cut into batches.

    A batch may span two epochs; no sample is left out. Raises `ValueError` for a negative step or nothing to draw from.
    """
    if step < 0 or count < 1 or size < 1:
        raise ValueError(f"step {step} of {count} samples in batches of {size}: step >= 0, the others >= 1")
    positions = range(step * size, (step + 1) * size)
    orders = {epoch: order(seed, epoch, count) for epoch in {position // count for position in positions}}
    return tuple(orders[position // count][position % count] for position in positions)
