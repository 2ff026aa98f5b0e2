"""What can be measured on a universe: its power spectrum, and the deviation in spheres."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cosmology import Array
from spectrum import sphere


class Modes:
    """The wave vectors of a box of `size`³ points and edge `box_mpc` (Mpc/h), in shells one fundamental mode wide.

    The highest wave numbers along each dim, whose phase a grid cannot hold, belong to no shell.
    """

    def __init__(self, size: int, box_mpc: float) -> None:
        self.size, self.box_mpc = size, box_mpc
        full = np.fft.fftfreq(size, 1 / size)
        self.numbers = full[:, None, None], full[None, :, None], np.arange(size // 2 + 1.0)[None, None, :]
        x, y, z = self.numbers
        self.k = 2 * math.pi / box_mpc * np.sqrt(x**2 + y**2 + z**2)
        # a real field has the modes of k and -k conjugate: those that are left out count double
        self.weight = np.broadcast_to(np.where((z > 0) & (z < size // 2), 2.0, 1.0), self.k.shape)
        shell = np.rint(self.k * box_mpc / (2 * math.pi)).astype(np.int64)
        highest = (np.abs(x) == size // 2) | (np.abs(y) == size // 2) | (z == size // 2)
        self.shell = np.where(highest | (shell >= size // 2), 0, shell)  # 0 is the mean, and what is left out

    @cached_property
    def count(self) -> Array:
        """Modes in each shell, k and -k both."""
        return self._sum(np.ones(1))

    def _sum(self, values: npt.NDArray[np.float64]) -> Array:
        weighted = np.broadcast_to(values, self.k.shape) * self.weight
        return np.bincount(self.shell.reshape(-1), weighted.reshape(-1))[1:].astype(np.float64)

    def mean(self, values: npt.NDArray[np.float64]) -> Array:
        """The mean of `values`, one for each wave vector, over each shell."""
        return self._sum(values) / self.count

    def of(self, function: Callable[[Array], Array]) -> Array:
        """The mean of a function of k over each shell: what a measurement there should give."""
        return self.mean(function(np.where(self.k > 0, self.k, 1.0)))

    def power(self, contrast: npt.NDArray[np.float64]) -> Array:
        """The power spectrum of a density contrast [N, N, N] in each shell, (Mpc/h)³."""
        return self.mean(np.abs(np.fft.rfftn(contrast)) ** 2) * self.box_mpc**3 / self.size**6

    def cloud(self) -> npt.NDArray[np.float64]:
        """By what the counting of cloud-in-cell weakens each mode: Π sinc²(k_i Δ / 2)."""
        x, y, z = (np.sinc(number / self.size) ** 2 for number in self.numbers)
        return x * y * z

    def smoothed(self, contrast: npt.NDArray[np.float64], radius: float) -> npt.NDArray[np.float64]:
        """A density contrast averaged over spheres of `radius` Mpc/h around each point."""
        modes = np.fft.rfftn(contrast) * sphere(self.k * radius)
        return np.fft.irfftn(modes, s=contrast.shape, axes=(0, 1, 2))


def contrast(counts: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Counts per cell as a density contrast: over their mean, less 1."""
    values = counts.astype(np.float64)
    return values / values.mean() - 1
