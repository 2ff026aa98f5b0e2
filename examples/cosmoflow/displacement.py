"""Where matter goes: Lagrangian perturbation theory of first (Zel'dovich 1970) and second order.

A particle that was at q is at x(q) = q + ψ(q), ψ = -D_1 ∇φ⁽¹⁾ + D_2 ∇φ⁽²⁾ with

    ∇²φ⁽¹⁾ = δ        ∇²φ⁽²⁾ = Σ_{i<j} (φ⁽¹⁾,ii φ⁽¹⁾,jj - (φ⁽¹⁾,ij)²)

(Bouchet, Colombi, Hivon & Juszkiewicz 1995; Scoccimarro 1998, appendix D). Both parts are gradients, so their
potentials are added in wave numbers and one transform gives a component of both. Wave numbers are whole, in units of the
fundamental one, so lengths are in units of box / 2π until the last factor.
"""

from __future__ import annotations

import math

import numpy as np

from cosmology import growth, growth_second
from fields import squared
from slabs import Complex, Real, Slabs

AXES = (0, 1, 2)


def odd_wave_numbers(slabs: Slabs) -> tuple[Real, Real, Real]:
    """Wave numbers for odd derivatives: 0 at the highest one, whose sine has no samples but zeros."""
    x, y, z = (np.where(np.abs(n) == slabs.size // 2, 0.0, n) for n in slabs.wave_numbers())
    return x, y, z


def inverse_squared(slabs: Slabs) -> Real:
    """1/|n|², and 0 for the mean."""
    n2 = squared(slabs)
    return np.divide(1.0, n2, out=np.zeros_like(n2), where=n2 > 0)


def second_source(slabs: Slabs, modes: Complex) -> Complex:
    """Modes of the right-hand side of the second equation, from those of δ. Seven transforms.

    Σ_{i<j} φ,ii φ,jj = ((Σ φ,ii)² - Σ (φ,ii)²) / 2, so that two fields are enough at a time.
    """
    straight, odd = slabs.wave_numbers(), odd_wave_numbers(slabs)
    potential = modes * -inverse_squared(slabs)
    total = np.zeros((slabs.planes.size, slabs.size, slabs.size))
    source = np.zeros_like(total)
    for i in AXES:
        bent = slabs.backward(potential * -(straight[i] ** 2))
        total += bent
        source -= bent**2 / 2
    source += total**2 / 2
    del total
    for i, j in ((0, 1), (0, 2), (1, 2)):
        source -= slabs.backward(potential * -(odd[i] * odd[j])) ** 2
    return slabs.forward(lambda plane: source[plane - slabs.planes.lo])


def potential_modes(slabs: Slabs, modes: Complex, second: Complex | None, omega_m: float, redshift: float) -> Complex:
    """Modes of -D_1 φ⁽¹⁾ + D_2 φ⁽²⁾ at a redshift; `modes` are those of δ today, `second` of `second_source`."""
    inverse = inverse_squared(slabs)
    potential = modes * (growth(omega_m, redshift) * inverse)
    if second is not None:
        potential -= second * (growth_second(omega_m, redshift) * inverse)
    return potential


def component(slabs: Slabs, potential: Complex, axis: int) -> Real:
    """ψ along `axis` on this rank's planes [planes, N, N], as a share of the box's edge."""
    return slabs.backward(potential * (1j / (2 * math.pi) * odd_wave_numbers(slabs)[axis]))
