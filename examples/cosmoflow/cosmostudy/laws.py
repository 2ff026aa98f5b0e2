"""Errors on held-out universes, their error bars, and the laws that the study asserts of its own output.

With p[s, u, c] the prediction of seed s for cube c of universe u and t[u] the truth, the error of a single cube is the
mean over s, u, c of (p − t)², that of a universe's mean the mean over s, u of (mean over c of p − t)².

Error bars have two parts, added in quadrature. *Universes*: the deviation of the error, averaged over seeds, over
bootstrap samples of the test universes (Efron, 1979). *Seeds*: deviation over seeds / √seeds. A difference of two
errors draws the same universes for both, for they are the same universes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PARAMETERS = ("Ω_m", "σ_8", "n_s", "H_0")
SIGMA_8 = 1
DRAWS = 2000  # bootstrap samples of the test universes
WIDTH = 1.96  # deviations: a 95 % interval

Array = np.ndarray[Any, np.dtype[np.float64]]
Key = tuple[int, bool]  # size, batch norm


@dataclass(frozen=True)
class Value:
    """A number and the half-width of its 95 % interval."""

    mean: float
    bar: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.bar:.3f}"

    @property
    def is_positive(self) -> bool:
        """Whether it is above 0 by more than its error bar."""
        return self.mean > self.bar


@dataclass(frozen=True)
class Errors:
    """Squared errors [seeds, universes, parameters] of one size: of single cubes and of the mean of a universe's."""

    cube: Array
    universe: Array

    @classmethod
    def of(cls, predicted: Sequence[Array], truth: Array) -> Errors:
        """From predictions [universes, cubes, parameters] of each seed and the truth [universes, parameters]."""
        found = np.stack(predicted) - truth[:, None]
        return cls((found**2).mean(2), found.mean(2) ** 2)


def with_bar(errors: Array, draws: int = DRAWS) -> Value:
    """The mean of errors [seeds, universes], and how well it is known."""
    return _value(errors.mean(), [errors], _resampled(errors.mean(0), errors.shape[1], draws))


def difference(worse: Array, better: Array, draws: int = DRAWS) -> Value:
    """How much smaller the errors [seeds, universes] `better` are than `worse`, for the same universes."""
    universes = worse.shape[1]
    between = worse.mean(0) - better.mean(0)
    return _value(between.mean(), [worse, better], _resampled(between, universes, draws))


def _resampled(values: Array, universes: int, draws: int) -> Array:
    """Means of bootstrap samples; the same ones for the same number of universes."""
    chosen = np.random.default_rng(universes).integers(0, universes, (draws, universes))
    means: Array = values[chosen].mean(1)
    return means


def _value(mean: float, groups: Sequence[Array], means: Array) -> Value:
    over_seeds = sum(group.mean(1).var(ddof=1) / len(group) for group in groups if len(group) > 1)
    return Value(float(mean), WIDTH * math.sqrt(means.var() + over_seeds))


@dataclass(frozen=True)
class Law:
    """A statement, the difference it is about, and whether that is above 0 by more than its error bar."""

    text: str
    difference: Value

    @property
    def holds(self) -> bool:
        return self.difference.is_positive

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'BROKEN'}  {self.text}: {self.difference}"


def laws(errors: Mapping[Key, Errors]) -> list[Law]:
    """What must hold of the errors of single cubes, as far as the trainings are there.

    σ_8 improves at every step to larger cubes, the mean of the parameters from the smallest to the largest, and batch
    norm helps.
    """
    sizes = sorted(size for size, batch_norm in errors if batch_norm)
    found = [
        Law(
            f"σ_8 is found better from {large}³ than from {small}³",
            difference(errors[small, True].cube[..., SIGMA_8], errors[large, True].cube[..., SIGMA_8]),
        )
        for small, large in itertools.pairwise(sizes)
    ]
    if len(sizes) > 1:
        small, large = sizes[0], sizes[-1]
        found.append(
            Law(
                f"the mean of all parameters is found better from {large}³ than from {small}³",
                difference(errors[small, True].cube.mean(-1), errors[large, True].cube.mean(-1)),
            )
        )
    for size in sorted(size for size, batch_norm in errors if not batch_norm and (size, True) in errors):
        plain, normed = errors[size, False].cube.mean(-1), errors[size, True].cube.mean(-1)
        found.append(Law(f"batch norm helps at {size}³ (mean of all parameters)", difference(plain, normed)))
    return found
