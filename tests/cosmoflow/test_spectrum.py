"""Eisenstein and Hu's spectrum against camb, which solves the equations; growth against what is known of it."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from cosmology import Parameters, growth, growth_second, omega_m_at
from meshwright.errors import DataError
from spectrum import RADIUS_8, full_transfer, power_spectrum, sigma, smooth_transfer, sphere
from universes import Settings

MIDDLE = Parameters(0.3, 0.85, 0.95, 0.67)
K = np.geomspace(1e-3, 10, 400)  # h/Mpc
MOST_OFF = 0.025  # of the transfer function with oscillations (the paper promises 0.1)
MOST_OFF_SMOOTH = 0.06


@pytest.mark.parametrize(
    "parameters", [MIDDLE, Parameters(0.25, 0.78, 0.9, 0.603), Parameters(0.35, 0.95, 1.0, 0.737)], ids=str
)
def test_both_fits_agree_with_camb(parameters: Parameters) -> None:
    pytest.importorskip("camb")
    exact = power_spectrum(parameters, "camb")(K)
    full, smooth = (np.sqrt(power_spectrum(parameters, name)(K) / exact) - 1 for name in ("eh", "eh-nowiggle"))
    assert np.abs(full).max() < MOST_OFF
    assert np.abs(smooth).max() < MOST_OFF_SMOOTH
    assert oscillation(full) < 0.5 * oscillation(smooth)


def oscillation(off: np.ndarray) -> float:
    """How much oscillates in what a fit is off by, beside a slow trend."""
    acoustic = (K > 0.02) & (K < 0.3)
    place, values = np.log(K[acoustic]), off[acoustic]
    return float((values - np.polyval(np.polyfit(place, values, 3), place)).std())


def test_transfer_functions_are_1_on_large_scales_and_agree_without_baryons(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = np.array([1e-5])
    for transfer in (full_transfer, smooth_transfer):
        assert transfer(MIDDLE, tiny) == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr("spectrum.OMEGA_B", 1e-6)
    assert full_transfer(MIDDLE, K) == pytest.approx(smooth_transfer(MIDDLE, K), rel=0.04)


@pytest.mark.parametrize("name", ["eh", "eh-nowiggle"])
def test_the_spectrum_has_the_sigma_8_and_the_tilt_it_is_asked_for(name: str) -> None:
    power = power_spectrum(MIDDLE, name)
    # by a rule of its own: uniform in k, not in its logarithm
    k = np.linspace(1e-5, 12, 400_000)
    variance = np.sum(k**2 * power(k) * sphere(k * RADIUS_8) ** 2) * (k[1] - k[0]) / (2 * math.pi**2)
    assert math.sqrt(variance) == pytest.approx(MIDDLE.sigma_8, rel=1e-3)
    assert sigma(power, RADIUS_8) == pytest.approx(MIDDLE.sigma_8, rel=1e-12)
    large = power(np.array([1e-5, 2e-5]))
    assert math.log2(large[1] / large[0]) == pytest.approx(MIDDLE.n_s, abs=1e-3)


def test_growth_against_the_closed_cases() -> None:
    for redshift in (0.0, 0.5, 1.5, 3.0):
        assert growth(1.0, redshift) == pytest.approx(1 / (1 + redshift), rel=1e-12)  # Einstein and de Sitter
        assert growth_second(1.0, redshift) == pytest.approx(-3 / 7 / (1 + redshift) ** 2, rel=1e-12)
    assert growth(0.3, 99.0) / growth(0.3, 199.0) == pytest.approx(2, rel=1e-4)  # matter rules early


@pytest.mark.parametrize("omega_m", [0.25, 0.3, 0.35])
def test_growth_against_the_fit_of_carroll_press_and_turner(omega_m: float) -> None:
    def fit(redshift: float) -> float:  # their equation 29, for flat universes
        matter = omega_m_at(omega_m, redshift)
        vacuum = 1 - matter
        return 2.5 * matter / (matter ** (4 / 7) - vacuum + (1 + matter / 2) * (1 + vacuum / 70)) / (1 + redshift)

    for redshift in (0.5, 1.0, 3.0):
        assert growth(omega_m, redshift) == pytest.approx(fit(redshift) / fit(0), rel=0.01)


def test_spheres_are_smooth_where_the_formula_cancels() -> None:
    x = np.geomspace(1e-6, 1, 200)
    assert sphere(x) == pytest.approx(1 - x**2 / 10 + x**4 / 280, abs=1e-4)
    assert np.all(np.diff(sphere(x)) <= 1e-12)


def test_without_camb_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "camb", None)
    with pytest.raises(DataError, match=r"pip install 'meshwright\[cosmology\]'"):
        power_spectrum(MIDDLE, "camb")


def test_parameters_fill_their_ranges_evenly_and_follow_from_seed_and_index() -> None:
    drawn = np.array([Settings(seed=3).parameters(index).array() for index in range(400)])
    ranges = Settings().ranges
    for column, (lo, hi) in zip(drawn.T, (ranges.omega_m, ranges.sigma_8, ranges.n_s, ranges.h_0), strict=True):
        assert lo <= column.min() < lo + 0.02 * (hi - lo)
        assert hi - 0.02 * (hi - lo) < column.max() <= hi
        shares = np.sort((column - lo) / (hi - lo))
        distance = np.abs(shares - (np.arange(400) + 0.5) / 400).max()
        assert distance < 1.63 / math.sqrt(400)  # Kolmogorov and Smirnov, 1 %
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 4 / math.sqrt(400)
    assert not np.array_equal(drawn[7], Settings(seed=4).parameters(7).array())
