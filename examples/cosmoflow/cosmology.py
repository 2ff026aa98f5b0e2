"""What a universe is made of, and how fast its structure grows (flat ΛCDM, no radiation, no neutrinos)."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

OMEGA_B = 0.049  # baryons, the same in every universe: the four parameters are what the network has to find
T_CMB_K = 2.7255  # Fixsen 2009
_NODES = 64  # of the Gauss-Legendre rule of the growth integral; its error is below 1e-12 then


@dataclass(frozen=True)
class Parameters:
    """The four numbers that a network reads off a universe."""

    omega_m: float  # matter, baryons included, as a share of the critical density today
    sigma_8: float  # deviation of the linear density contrast in spheres of 8 Mpc/h today
    n_s: float  # tilt of the primordial spectrum
    h_0: float  # Hubble's constant in 100 km/s/Mpc

    def array(self) -> Array:
        """(omega_m, sigma_8, n_s, h_0), float64: what a file of a universe holds."""
        return np.array(astuple(self), np.float64)


def expansion(omega_m: float, a: Array | float) -> Array:
    """H(a)/H_0 at the scale factor a = 1/(1 + z)."""
    scale = np.asarray(a, np.float64)
    return np.sqrt(omega_m / scale**3 + (1 - omega_m))


def omega_m_at(omega_m: float, redshift: float) -> float:
    """The share of matter at a redshift."""
    a = 1 / (1 + redshift)
    return float(omega_m / a**3 / expansion(omega_m, a) ** 2)


def growth(omega_m: float, redshift: float) -> float:
    """The linear growth factor D_1(z), 1 today.

    D_1 ∝ H(a) ∫₀ᵃ da' / (a' H(a'))³ (Heath 1977; Carroll, Press & Turner 1992). With a' = a u² the
    integrand is smooth at 0.
    """

    def unnormalised(a: float) -> float:
        node, weight = np.polynomial.legendre.leggauss(_NODES)
        u, du = (node + 1) / 2, weight / 2
        inner = a * u**2
        integral = np.sum(du * 2 * a * u / (inner * expansion(omega_m, inner)) ** 3)
        return float(expansion(omega_m, a) * integral)

    return unnormalised(1 / (1 + redshift)) / unnormalised(1.0)


def growth_second(omega_m: float, redshift: float) -> float:
    """The growth factor of the second-order displacement, D_2 = -3/7 D_1² Ω_m(z)^(-1/143).

    For flat universes with a cosmological constant to 0.6 % (Bouchet, Colombi, Hivon & Juszkiewicz 1995; Scoccimarro
    1998, appendix D).
    """
    return -3 / 7 * growth(omega_m, redshift) ** 2 * omega_m_at(omega_m, redshift) ** (-1 / 143)
