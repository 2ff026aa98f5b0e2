"""Where matter goes: Lagrangian perturbation theory of first (Zel'dovich 1970) and second order.

A particle that was at q is at x(q) = q + ψ(q), ψ = -D_1 ∇φ⁽¹⁾ + D_2 ∇φ⁽²⁾ with

    ∇²φ⁽¹⁾ = δ        ∇²φ⁽²⁾ = Σ_{i<j} (φ⁽¹⁾,ii φ⁽¹⁾,jj - (φ⁽¹⁾,ij)²)

(Bouchet, Colombi, Hivon & Juszkiewicz 1995; Scoccimarro 1998, appendix D). Both parts are gradients, so their
potentials are added in wave numbers, and one transform gives a component of both. Wave numbers are whole, in units of
the fundamental one, so lengths are in units of box / 2π until the last factor.
"""

from __future__ import annotations

import math

import numpy as np

from cosmology import growth, growth_second
from slabs import Complex, Real, Rows, Slabs

AXES = (0, 1, 2)


def inverse_squared(slabs: Slabs, row: int) -> Real:
    """1/|n|² in a row of this rank's, [N, N // 2 + 1], and 0 for the mean."""
    x, y, z = slabs.wave_numbers(row)
    squared = x**2 + y**2 + z**2
    return np.divide(1.0, squared, out=np.zeros_like(squared), where=squared > 0)


def odd_wave_number(slabs: Slabs, row: int, axis: int) -> Real:
    """For odd derivatives: 0 at the highest one, whose sine is 0 at every sample."""
    number = slabs.wave_numbers(row)[axis]
    return np.where(np.abs(number) == slabs.size // 2, 0.0, number)


def second_source(slabs: Slabs, modes: Complex) -> Complex:
    """Modes of the right-hand side of the second equation, from the modes of δ. Seven transforms.

    Σ_{i<j} φ,ii φ,jj = ((Σ φ,ii)² - Σ (φ,ii)²) / 2, so that three fields are enough at a time.
    """

    def bent(i: int, j: int) -> Real:  # φ,ij: twice along the same dim is even, and keeps the highest wave number
        def row(number: int) -> Complex:
            if i == j:
                factor = slabs.wave_numbers(number)[i] ** 2
            else:
                factor = odd_wave_number(slabs, number, i) * odd_wave_number(slabs, number, j)
            return modes[:, number].copy() * (inverse_squared(slabs, number) * factor)

        return slabs.backward(row)

    total = bent(0, 0)
    source = total**2 / -2
    for axis in (1, 2):
        field = bent(axis, axis)
        total += field
        field **= 2
        field /= 2
        source -= field
    total **= 2
    total /= 2
    source += total
    del total, field
    for i, j in ((0, 1), (0, 2), (1, 2)):
        field = bent(i, j)
        field **= 2
        source -= field
    return slabs.forward(lambda plane: source[plane])


def potential(slabs: Slabs, modes: Complex, second: Complex | None, omega_m: float, redshift: float) -> Rows:
    """Modes of -D_1 φ⁽¹⁾ + D_2 φ⁽²⁾ at a redshift; `modes` are those of δ today, `second` those of `second_source`."""
    first_growth, second_growth = growth(omega_m, redshift), growth_second(omega_m, redshift)

    def row(j: int) -> Complex:
        inverse = inverse_squared(slabs, j)
        sum_ = modes[:, j].copy() * (first_growth * inverse)
        return sum_ if second is None else sum_ - second[:, j].copy() * (second_growth * inverse)

    return row


def component(slabs: Slabs, of: Rows, axis: int) -> Real:
    """ψ along `axis` on this rank's planes, [planes, N, N], from its `potential`; in units of the box's edge."""
    return slabs.backward(lambda j: of(j) * (1j / (2 * math.pi) * odd_wave_number(slabs, j, axis)))
