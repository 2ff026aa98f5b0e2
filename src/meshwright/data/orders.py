"""Orders of samples that care what a sample is: weighted draws, and batches that hold classes in proportion."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from meshwright.data.chance import key, words
from meshwright.data.sampler import Indices, shuffle
from meshwright.parallel.noise import unit

_STREAM = 0x77677431  # keeps these numbers apart from others drawn from the same seed


@dataclass(frozen=True)
class Weighted:
    """Draws with replacement: sample i with probability weights[i] / sum, an epoch of `count` draws (None: as many).

    By inversion of the distribution function with a binary search (Devroye, "Non-Uniform Random Variate Generation",
    1986, III.2): draw number p of an epoch depends on nothing but seed, epoch and p. Raises `ValueError` for weights
    that are negative, not finite, or all 0.
    """

    weights: tuple[float, ...]
    draws: int | None = None
    name: str = field(default="weighted", init=False)

    def __post_init__(self) -> None:
        wrong = [weight for weight in self.weights if not 0 <= weight < math.inf]
        if wrong or not sum(self.weights) > 0 or not math.isfinite(sum(self.weights)):
            what = f"{wrong[0]} among them" if wrong else f"their sum is {sum(self.weights)}"
            raise ValueError(f"weights must be finite and not negative, with a sum above 0: {what}")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"{self.draws} draws an epoch: at least 1 is needed")

    @property
    def count(self) -> int:
        return len(self.weights) if self.draws is None else self.draws

    @cached_property
    def _reach(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.cumsum(np.asarray(self.weights, np.float64))

    def span(self, seed: int, epoch: int, lo: int, hi: int) -> Indices:
        at = unit(words(key(_STREAM, seed, epoch), self.count, lo, hi)).numpy() * self._reach[-1]
        found = np.searchsorted(self._reach, at, side="right")  # right: a weight of 0 has no width to fall into
        last = int(np.flatnonzero(self.weights)[-1])  # rounding may reach the upper end
        return np.minimum(found, last).astype(np.int64)


@dataclass(frozen=True)
class Stratified:
    """Each sample once an epoch, and the classes in proportion in every batch, whatever its size.

    `classes` names the class of each sample. The sequence of classes is Tijdeman's ("The chairman assignment problem",
    Discrete Mathematics 32, 1980): after any number of samples each class is less than 1 away from its share, so a
    batch of any size at any place is less than 2 away. Which sample of a class comes is drawn anew each epoch.
    """

    classes: tuple[int | str, ...]
    name: str = field(default="stratified", init=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("0 samples: at least 1 is needed")

    @property
    def count(self) -> int:
        return len(self.classes)

    @cached_property
    def _members(self) -> tuple[Indices, ...]:
        """The samples of each class; classes in the order in which they first occur."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.classes))}
        of = np.array([numbers[name] for name in self.classes])
        return tuple(np.flatnonzero(of == number) for number in range(len(numbers)))

    @cached_property
    def _pattern(self) -> Indices:
        """The class at each place of an epoch."""
        return np.array(chairmen(tuple(len(members) for members in self._members)), np.int64)

    @cached_property
    def _last(self) -> dict[tuple[int, int], Indices]:
        return {}

    def span(self, seed: int, epoch: int, lo: int, hi: int) -> Indices:
        if (seed, epoch) not in self._last:
            whole = np.empty(self.count, np.int64)
            for number, members in enumerate(self._members):
                whole[self._pattern == number] = members[shuffle(len(members), seed, epoch, number)]
            self._last.clear()  # one epoch is kept
            self._last[seed, epoch] = whole
        return self._last[seed, epoch][lo:hi]


def chairmen(counts: Sequence[int]) -> list[int]:
    """A sequence in which class c occurs `counts[c]` times and each beginning of it holds all classes in proportion.

    With k classes and ε = 1 / (2k − 2), the j-th of a class of share λ may come from place (j − 1 + ε) / λ on and must
    come by 1 + (j − ε) / λ (rounded up and down), which keeps it within 1 − ε of its share; of those that may, the one
    that must come first does. Tijdeman proves that nobody is late. Whole numbers throughout.
    """
    total, k = sum(counts), len(counts)
    if k == 1:
        return [0] * total
    scale = 2 * k - 2

    def item(c: int, j: int) -> tuple[int, int]:
        low, high = ((j - 1) * scale + 1) * total, (j * scale - 1) * total
        return -(-low // (scale * counts[c])), high // (scale * counts[c]) + 1

    waiting = [(item(c, 1)[0], c, 1) for c in range(k) if counts[c]]  # (from when, class, which of it)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (until when, class, which of it)
    found: list[int] = []
    for place in range(1, total + 1):
        while waiting and waiting[0][0] <= place:
            _, c, j = heapq.heappop(waiting)
            heapq.heappush(ready, (item(c, j)[1], c, j))
        until, c, j = heapq.heappop(ready)
        assert until >= place, (counts, place)
        found.append(c)
        if j < counts[c]:
            heapq.heappush(waiting, (item(c, j + 1)[0], c, j + 1))
    return found


def balanced(classes: Sequence[int | str]) -> tuple[float, ...]:
    """Weights that make every class equally likely: 1 / the size of the sample's class."""
    sizes = Counter(classes)
    return tuple(1 / sizes[name] for name in classes)
