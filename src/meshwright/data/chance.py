"""Random numbers for decisions about a sample: a function of a stream, the seed and the place in the order."""

from __future__ import annotations

import torch

from meshwright.parallel import noise
from meshwright.plan.geometry import Interval


def key(*numbers: int) -> int:
    """A 63-bit key from whole numbers, each of which changes it altogether."""
    mixed = 0
    for number in numbers:
        mixed = noise.mix(mixed ^ number)
    return mixed


def words(of: int, count: int, lo: int = 0, hi: int | None = None) -> torch.Tensor:
    """64 random bits (int64) for each of the places lo … hi - 1 of `count`, under the key `of`."""
    return noise.words(of, (count,), (Interval(lo, count if hi is None else hi),), torch.device("cpu"))


def units(of: int, count: int) -> list[float]:
    """`count` numbers, uniform in [0, 1)."""
    found: list[float] = noise.unit(words(of, count)).tolist()
    return found
