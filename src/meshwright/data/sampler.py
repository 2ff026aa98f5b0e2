"""Which samples a step trains on: a pure function of seed, epoch and position. Ranks never disagree.

The position counts samples, not steps, so that a run which resumes with other ranks and another batch size goes on in
the same order. Random bits come from the counter-based generator of `parallel.noise`, not from a library's stream: the
order of a seed is the same on every machine and with every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from meshwright.data.chance import key, words
from meshwright.errors import DataError

_STREAM = 0x736D7031  # keeps these numbers apart from others drawn from the same seed

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Order(Protocol):
    """The samples of an epoch, one behind the other."""

    @property
    def name(self) -> str:
        """How it draws: saved, and compared on resuming."""

    @property
    def count(self) -> int:
        """Samples an epoch."""

    def span(self, seed: int, epoch: int, lo: int, hi: int) -> Indices:
        """The samples at the places lo … hi - 1 (within 0 … count) of `epoch`."""


@lru_cache(maxsize=4)
def shuffle(count: int, *numbers: int) -> Indices:
    """A random permutation of 0 … count - 1 that depends on `numbers`: the order of random words. Not to be written."""
    found: Indices = torch.argsort(words(key(_STREAM, *numbers), count), stable=True).numpy()
    found.flags.writeable = False
    return found


@dataclass(frozen=True)
class Shuffled:
    """Each of `count` samples once an epoch, in an order drawn anew for each. Raises `ValueError` below 1."""

    count: int
    name: str = "shuffled"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.count} samples: at least 1 is needed")

    def span(self, seed: int, epoch: int, lo: int, hi: int) -> Indices:
        return shuffle(self.count, seed, epoch)[lo:hi]


@dataclass(frozen=True)
class Sampler:
    """An order, a seed and how far training is: `seen` samples. A value; `after` gives the next one.

    What is saved is four small values; the order itself is computed again from them.
    """

    order: Order
    seed: int
    seen: int = 0

    def batch(self, size: int) -> tuple[int, ...]:
        """The next `size` samples: the epochs' orders one behind the other, so a batch may span two epochs."""
        if size < 1 or self.seen < 0:
            raise ValueError(f"{size} samples in batches from position {self.seen}: size >= 1, position >= 0")
        count, found = self.order.count, list[int]()
        while len(found) < size:
            epoch, lo = divmod(self.seen + len(found), count)
            hi = min(count, lo + size - len(found))
            found += self.order.span(self.seed, epoch, lo, hi).tolist()
        return tuple(found)

    def after(self, size: int) -> Sampler:
        """The sampler once a batch of `size` has been trained on."""
        return replace(self, seen=self.seen + size)

    @property
    def epoch(self) -> int:
        return self.seen // self.order.count

    def save(self) -> dict[str, int | str]:
        """Plain values for a checkpoint."""
        return {"order": self.order.name, "samples": self.order.count, "seed": self.seed, "seen": self.seen}

    def load(self, saved: Mapping[str, Any]) -> Sampler:
        """This sampler at the saved position. Raises `DataError` if another order was saved, or something else."""
        own = self.save()
        kinds = {what: type(value) for what, value in own.items()}
        if {what: type(value) for what, value in saved.items()} != kinds or saved["seen"] < 0:
            raise DataError(f"{dict(saved)!r} is no saved position of a sampler, such as {own}")
        for what in ("order", "samples", "seed"):
            if saved[what] != own[what]:
                raise DataError(
                    f"the checkpoint was in an order with {what} = {saved[what]}, this job has {what} = {own[what]}: "
                    "the epoch cannot go on where it was; use the same data and seed, or start anew"
                )
        return replace(self, seen=saved["seen"])


def order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of `count` samples in one epoch: each of them once."""
    return tuple(shuffle(count, seed, epoch).tolist())


def batch(seed: int, step: int, count: int, size: int = 1) -> tuple[int, ...]:
    """The `size` samples of `step` (from 0) where every step has the same size: `Sampler` at step · size.

    Raises `ValueError` for a negative step or nothing to draw from.
    """
    if step < 0 or count < 1 or size < 1:
        raise ValueError(f"step {step} of {count} samples in batches of {size}: step >= 0, the others >= 1")
    return Sampler(Shuffled(count), seed, step * size).batch(size)
