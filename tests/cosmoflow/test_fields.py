"""The Gaussian field has the spectrum that it is made from, within what chance allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cosmology import Parameters
from fields import gaussian_modes, white_plane
from measure import Modes
from slabs import Slabs
from spectrum import RADIUS_8, power_spectrum, sphere

SIZE, BOX = 64, 256.0
PARAMETERS = Parameters(0.3, 0.85, 0.95, 0.67)
SIGMAS = 4.0  # chance exceeds it once in 16,000


@pytest.fixture(scope="module")
def modes() -> Modes:
    return Modes(SIZE, BOX)


def field(key: int) -> np.ndarray:
    slabs = Slabs(SIZE)
    found = gaussian_modes(slabs, key, power_spectrum(PARAMETERS, "eh"), BOX)
    return slabs.backward(lambda row: found[:, row].copy())


def test_white_noise_is_normal_and_a_function_of_position() -> None:
    planes = np.stack([white_plane(11, 32, plane) for plane in range(32)])
    count = planes.size
    assert abs(planes.mean()) < SIGMAS / math.sqrt(count)
    assert abs(planes.var() - 1) < SIGMAS * math.sqrt(2 / count)
    assert abs((planes**4).mean() - 3) < SIGMAS * math.sqrt(96 / count)
    for axis in range(3):  # neighbours know nothing of each other
        assert abs((planes * np.roll(planes, 1, axis)).mean()) < SIGMAS / math.sqrt(count)
    assert np.array_equal(planes[5], white_plane(11, 32, 5))
    assert not np.array_equal(planes[5], white_plane(12, 32, 5))


def test_the_spectrum_of_the_field_is_the_input(modes: Modes) -> None:
    """Power in a shell of M modes is that of M / 2 exponential numbers: relative variance 2 / M."""
    ratio = modes.power(field(1)) / modes.of(power_spectrum(PARAMETERS, "eh"))
    deviation = (ratio - 1) * np.sqrt(modes.count / 2)
    shells = len(deviation)
    assert np.abs(deviation[8:]).max() < SIGMAS  # with hundreds of modes their sum is as good as normal
    assert abs((deviation**2).sum() - shells) < SIGMAS * math.sqrt(2 * shells)
    total = (ratio * modes.count).sum() / modes.count.sum()
    assert abs(total - 1) < SIGMAS * math.sqrt(2 / modes.count.sum())  # 0.5 %: the amplitude


def test_the_field_is_normal_and_its_mean_is_0() -> None:
    values = field(2)
    assert abs(values.mean()) < 1e-12
    # neighbours are alike, so there are far fewer independent values than points: a bound by hand
    assert abs((values**3).mean() / values.std() ** 3) < 0.05
    assert abs((values**4).mean() / values.var() ** 2 - 3) < 0.1


def test_sigma_8_measured_on_the_grid(modes: Modes) -> None:
    """Averaged over four fields; what the box is too small to hold, and chance, are known exactly."""
    power = power_spectrum(PARAMETERS, "eh")
    k = np.where(modes.k > 0, modes.k, 1.0)
    each = np.where(modes.k > 0, power(k) * sphere(k * RADIUS_8) ** 2, 0.0) / BOX**3
    expected = (each * modes.weight).sum()
    chance = math.sqrt(2 * (each**2 * modes.weight).sum() / 4)
    found = np.mean([modes.smoothed(field(key), RADIUS_8).var() for key in range(4)])
    assert abs(found - expected) < SIGMAS * chance
    assert math.sqrt(expected) == pytest.approx(PARAMETERS.sigma_8, rel=0.02)  # what lies beyond the box
    assert math.sqrt(found) == pytest.approx(PARAMETERS.sigma_8, rel=0.05)
