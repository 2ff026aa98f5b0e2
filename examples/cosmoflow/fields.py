"""Gaussian random fields: white noise that is a function of position, shaped by a power spectrum."""

from __future__ import annotations

import math

import numpy as np
import torch

from cosmology import Array
from meshwright.parallel import noise
from meshwright.plan.geometry import Interval
from slabs import Complex, Real, Slabs
from spectrum import Power


def white_plane(key: int, size: int, plane: int) -> Real:
    """Plane `plane` [N, N] of the white noise of a box: independent standard normal numbers.

    A number depends on the key and on its global position alone, so any rank can draw any plane.
    """
    everywhere, out = Interval(0, size), torch.empty(1, size, size, dtype=torch.float64)
    box = (Interval(plane, plane + 1), everywhere, everywhere)
    noise.fill(out, key, (size, size, size), box, lambda bits, _: noise.normal(bits))
    plain: Real = out[0].numpy()
    return plain


def squared(slabs: Slabs) -> Array:
    """|n|² of this rank's modes [N, rows, N // 2 + 1], in units of the fundamental wave number."""
    x, y, z = slabs.wave_numbers()
    return x**2 + y**2 + z**2


def gaussian_modes(slabs: Slabs, key: int, power: Power, box_mpc: float) -> Complex:
    """The modes δ_k of this rank of a density contrast whose spectrum is `power` (box_mpc in Mpc/h); its mean is 0.

    ⟨|δ_k|²⟩ = P(k) N⁶ / V in the convention of numpy's transforms, and that of white noise is N³.
    """
    modes = slabs.forward(lambda plane: white_plane(key, slabs.size, plane))
    amplitude = np.zeros(3 * (slabs.size // 2) ** 2 + 1)  # |n|² is a whole number: a table of all there are
    k = 2 * math.pi / box_mpc * np.sqrt(np.arange(1, amplitude.size))
    amplitude[1:] = np.sqrt(power(k) * slabs.size**3 / box_mpc**3)
    x, y, z = (number.astype(np.int64) for number in slabs.wave_numbers())
    for first in range(slabs.size):  # by planes, so that the indices take no memory
        modes[first] *= amplitude[(x[first] ** 2 + y[0] ** 2 + z[0] ** 2)]
    return modes
