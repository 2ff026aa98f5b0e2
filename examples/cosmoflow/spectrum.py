"""The linear power spectrum of matter today: Eisenstein & Hu 1998 (astro-ph/9709112), or the program camb.

Wave numbers come in h/Mpc and powers go in (Mpc/h)³. Numbers in brackets are equations of the paper, whose own wave
numbers are in 1/Mpc. The paper promises the transfer function to better than 10 %; in the ranges of `universes.Ranges`
it is within 2.5 % of camb's. The smooth one leaves out the acoustic oscillations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cosmology import OMEGA_B, T_CMB_K, Array, Parameters
from meshwright.errors import DataError

Name = Literal["eh", "eh-nowiggle", "camb"]
Power = Callable[[Array], Array]

THETA = T_CMB_K / 2.7
RADIUS_8 = 8.0  # Mpc/h, of the spheres of sigma_8
_K_LEAST, _K_MOST = 1e-4, 50.0  # h/Mpc; what the integral of sigma_8 spans
_CAMB_MOST, _CAMB_POINTS = 10.0, 600  # h/Mpc; camb's time grows with it


def power_spectrum(parameters: Parameters, name: Name) -> Power:
    """P(k) today, of the given `sigma_8`: k in h/Mpc (above 0) to (Mpc/h)³. Raises `DataError` without camb."""
    shape = _camb(parameters) if name == "camb" else _eisenstein_hu(parameters, wiggles=name == "eh")
    scale = (parameters.sigma_8 / sigma(shape, RADIUS_8)) ** 2
    return lambda k: scale * shape(k)


def sigma(power: Power, radius: float) -> float:
    """The deviation of the density contrast in spheres of `radius` Mpc/h: σ² = ∫ dk/k k³P(k)/2π² W²(kR)."""
    k = np.geomspace(_K_LEAST, _K_MOST, 8192)
    integrand = k**3 * power(k) / (2 * math.pi**2) * sphere(k * radius) ** 2
    return math.sqrt(np.sum((integrand[1:] + integrand[:-1]) / 2 * np.diff(np.log(k))))


def sphere(x: Array) -> Array:
    """The Fourier transform of a sphere's top hat, 3 (sin x - x cos x)/x³."""
    small = np.abs(x) < 1e-2  # the difference cancels there
    safe = np.where(small, 1.0, x)
    return np.where(small, 1 - x**2 / 10, 3 * (np.sin(safe) - safe * np.cos(safe)) / safe**3)


def _eisenstein_hu(parameters: Parameters, *, wiggles: bool) -> Power:
    transfer = full_transfer if wiggles else smooth_transfer
    return lambda k: k**parameters.n_s * transfer(parameters, k) ** 2


@dataclass(frozen=True)
class _Densities:
    """What both transfer functions are written in."""

    matter: float  # Ω_m h²
    baryons: float  # Ω_b h²
    share: float  # Ω_b / Ω_m

    @classmethod
    def of(cls, p: Parameters) -> _Densities:
        return cls(p.omega_m * p.h_0**2, OMEGA_B * p.h_0**2, OMEGA_B / p.omega_m)


def smooth_transfer(parameters: Parameters, k: Array) -> Array:
    """The transfer function without acoustic oscillations (26, 28 to 31)."""
    d = _Densities.of(parameters)
    sound = 44.5 * math.log(9.83 / d.matter) / math.sqrt(1 + 10 * d.baryons**0.75)  # Mpc (26)
    alpha = 1 - 0.328 * math.log(431 * d.matter) * d.share + 0.38 * math.log(22.3 * d.matter) * d.share**2  # (31)
    per_mpc = k * parameters.h_0
    gamma = parameters.omega_m * parameters.h_0 * (alpha + (1 - alpha) / (1 + (0.43 * per_mpc * sound) ** 4))  # (30)
    q = k * THETA**2 / gamma  # (28)
    logarithm = np.log(2 * math.e + 1.8 * q)
    return logarithm / (logarithm + (14.2 + 731 / (1 + 62.5 * q)) * q**2)  # (29)


def full_transfer(parameters: Parameters, k: Array) -> Array:
    """The transfer function with acoustic oscillations (2 to 24)."""
    d = _Densities.of(parameters)
    per_mpc = k * parameters.h_0
    z_equal = 2.5e4 * d.matter / THETA**4  # (2)
    k_equal = 7.46e-2 * d.matter / THETA**2  # 1/Mpc (3)
    drag_1 = 0.313 * d.matter**-0.419 * (1 + 0.607 * d.matter**0.674)
    drag_2 = 0.238 * d.matter**0.223
    z_drag = 1291 * d.matter**0.251 / (1 + 0.659 * d.matter**0.828) * (1 + drag_1 * d.baryons**drag_2)  # (4)
    loaded_drag, loaded_equal = (31.5 * d.baryons / THETA**4 * 1e3 / z for z in (z_drag, z_equal))  # (5)
    sound = (  # Mpc (6)
        2 / (3 * k_equal) * math.sqrt(6 / loaded_equal)
        * math.log((math.sqrt(1 + loaded_drag) + math.sqrt(loaded_drag + loaded_equal)) / (1 + math.sqrt(loaded_equal)))
    )  # fmt: skip
    k_silk = 1.6 * d.baryons**0.52 * d.matter**0.73 * (1 + (10.4 * d.matter) ** -0.95)  # 1/Mpc (7)
    q, x = per_mpc / (13.41 * k_equal), per_mpc * sound  # (10)

    first = (46.9 * d.matter) ** 0.670 * (1 + (32.1 * d.matter) ** -0.532)
    second = (12.0 * d.matter) ** 0.424 * (1 + (45.0 * d.matter) ** -0.582)
    alpha_c = first**-d.share * second ** -(d.share**3)  # (11)
    strength = 0.944 / (1 + (458 * d.matter) ** -0.708)
    exponent = (0.395 * d.matter) ** -0.0266
    beta_c = 1 / (1 + strength * ((1 - d.share) ** exponent - 1))  # (12)
    blend = 1 / (1 + (x / 5.4) ** 4)  # (18)
    cold = blend * _pressureless(q, 1, beta_c) + (1 - blend) * _pressureless(q, alpha_c, beta_c)  # (17)

    alpha_b = 2.07 * k_equal * sound * (1 + loaded_drag) ** -0.75 * _suppression((1 + z_equal) / (1 + z_drag))  # (15)
    node = 8.41 * d.matter**0.435  # (23)
    beta_b = 0.5 + d.share + (3 - 2 * d.share) * math.sqrt((17.2 * d.matter) ** 2 + 1)  # (24)
    shifted = x / (1 + (node / x) ** 3) ** (1 / 3)  # k s̃ (22)
    envelope = _pressureless(q, 1, 1) / (1 + (x / 5.2) ** 2)
    envelope = envelope + alpha_b / (1 + (beta_b / x) ** 3) * np.exp(-((per_mpc / k_silk) ** 1.4))
    baryons = envelope * np.sinc(shifted / math.pi)  # (21)
    return d.share * baryons + (1 - d.share) * cold  # (16)


def _pressureless(q: Array, alpha: float, beta: float) -> Array:
    """T̃_0 (19, 20)."""
    logarithm = np.log(math.e + 1.8 * beta * q)
    return logarithm / (logarithm + (14.2 / alpha + 386 / (1 + 69.9 * q**1.08)) * q**2)


def _suppression(y: float) -> float:
    """G(y) (14)."""
    root = math.sqrt(1 + y)
    return y * (-6 * root + (2 + 3 * y) * math.log((root + 1) / (root - 1)))


def _camb(parameters: Parameters) -> Power:
    """The spectrum of camb at z = 0: a table, between whose points both logarithms are linear.

    Above the table (10 h/Mpc) it goes on as Eisenstein and Hu's does.
    """
    try:
        import camb
    except ModuleNotFoundError:
        raise DataError("the spectrum 'camb' needs the program camb: pip install 'meshwright[cosmology]'") from None
    d = _Densities.of(parameters)
    settings = camb.CAMBparams(WantCls=False)
    settings.set_cosmology(
        H0=100 * parameters.h_0, ombh2=d.baryons, omch2=d.matter - d.baryons, mnu=0.0, omk=0.0, TCMB=T_CMB_K
    )
    settings.InitPower.set_params(As=2e-9, ns=parameters.n_s)  # the amplitude is that of sigma_8 in the end
    settings.set_matter_power(redshifts=[0.0], kmax=2 * _CAMB_MOST)
    settings.NonLinear = camb.model.NonLinear_none
    found = camb.get_results(settings).get_matter_power_spectrum(_K_LEAST, _CAMB_MOST, npoints=_CAMB_POINTS)
    log_k, log_p = np.log(found[0]), np.log(found[2][0])
    beyond = _eisenstein_hu(parameters, wiggles=True)

    def power(k: Array) -> Array:
        table = np.exp(np.interp(np.log(k), log_k, log_p))
        above = k > _CAMB_MOST
        table[above] *= beyond(k[above]) / beyond(np.array([_CAMB_MOST]))
        return table

    return power
