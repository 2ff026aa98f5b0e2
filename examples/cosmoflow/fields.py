"""Gaussian random fields: white noise that is a function of position, shaped by a power spectrum."""

from __future__ import annotations

import math

import numpy as np
import torch

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


def gaussian_modes(slabs: Slabs, key: int, power: Power, box_mpc: float) -> Complex:
    """The modes δ_k of this rank, [N, rows, N // 2 + 1], of a density contrast of mean 0 and spectrum `power`.

    ⟨|δ_k|²⟩ = P(k) N⁶ / V in the convention of numpy's transforms, of which white noise has N³. `box_mpc` in Mpc/h.
    """
    modes = slabs.forward(lambda i: white_plane(key, slabs.size, slabs.mine.lo + i))
    amplitude = np.zeros(3 * (slabs.size // 2) ** 2 + 1)  # |n|² is a whole number: a table of all there are
    k = 2 * math.pi / box_mpc * np.sqrt(np.arange(1, amplitude.size))
    amplitude[1:] = np.sqrt(power(k) * slabs.size**3 / box_mpc**3)
    for j in range(slabs.mine.size):
        x, y, z = slabs.wave_numbers(j)
        modes[:, j] = modes[:, j].copy() * amplitude[(x**2 + y**2 + z**2).astype(np.int64)]
    return modes
