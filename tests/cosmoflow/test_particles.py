"""Counts against counting by hand; the order of the particles; their spectrum."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from cosmology import Parameters, growth
from displacement import potential
from fields import gaussian_modes
from measure import Modes, contrast
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval
from particles import BITS, counts, layers, positions, unpacked
from slabs import Slabs
from spectrum import power_spectrum
from universes import CIC_UNIT, STEPS, Settings

PARAMETERS = Parameters(0.3, 0.85, 0.95, 0.67)
RNG = np.random.default_rng(5)


def scattered(size: int, count: int) -> np.ndarray:
    places = RNG.integers(0, size * STEPS, (count, 3))
    return places[:, 0] << (2 * BITS) | places[:, 1] << BITS | places[:, 2]


def by_hand(packed: np.ndarray, size: int) -> np.ndarray:
    """Cloud-in-cell in floating point, particle by particle."""
    sums = np.zeros((size, size, size))
    for one in packed:
        place = np.array([unpacked(one, axis) for axis in range(3)]) / STEPS - 0.5
        cell, away = np.floor(place).astype(int), place - np.floor(place)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod([a if c else 1 - a for a, c in zip(away, corner, strict=True)])
            sums[tuple((cell + corner) % size)] += weight
    return sums


def test_nearest_cell_is_the_histogram() -> None:
    settings, packed = Settings(voxels=6), scattered(6, 5000)
    places = np.stack([unpacked(packed, axis) / STEPS for axis in range(3)], axis=1)
    wanted, _ = np.histogramdd(places, bins=(6, 6, 6), range=((0, 6),) * 3)
    assert np.array_equal(counts(settings, Interval(0, 6), packed), wanted)


def test_cloud_in_cell_by_hand() -> None:
    settings, packed = Settings(voxels=4, assignment="cic"), scattered(4, 500)
    found = counts(settings, Interval(0, 4), packed)
    assert np.abs(found / CIC_UNIT - by_hand(packed, 4)).max() <= 0.5 / CIC_UNIT + 1e-12
    assert abs(found.sum() / CIC_UNIT - 500) < 0.5 * 64 / CIC_UNIT


@pytest.mark.parametrize("assignment", ["ngp", "cic"])
def test_neither_order_nor_cut_changes_a_bit(assignment: str) -> None:
    settings, packed = Settings(voxels=20, assignment=assignment), scattered(20, 70_000)
    whole = counts(settings, Interval(0, 20), packed)
    assert np.array_equal(whole, counts(settings, Interval(0, 20), RNG.permutation(packed)))
    parts = [counts(settings, Interval(lo, hi), packed) for lo, hi in ((0, 7), (7, 7), (7, 19), (19, 20))]
    assert np.array_equal(whole, np.concatenate(parts))


def test_what_an_int16_cannot_hold_is_refused() -> None:
    for assignment, most in (("ngp", 32767), ("cic", 32767 // CIC_UNIT)):
        settings = Settings(voxels=4, assignment=assignment)
        middle = STEPS // 2  # of the first cell, where all of a particle's weight is in it
        packed = np.full(most, middle << (2 * BITS) | middle << BITS | middle, np.int64)
        assert counts(settings, Interval(0, 4), packed)[0, 0, 0] == most * settings.unit
        with pytest.raises(DataError, match="fewer particles"):
            counts(settings, Interval(0, 4), np.append(packed, packed[:1]))


def test_layers_are_whole_chunks_that_tile_the_box() -> None:
    for voxels in (6, 40, 64, 128, 512):
        for ranks in (1, 2, 3, 5, 8):
            settings = Settings(voxels=voxels)
            parts = layers(settings, ranks)
            assert [parts[0].lo, parts[-1].hi] == [0, voxels]
            assert all(one.hi == two.lo for one, two in pairwise(parts))
            assert all(part.lo % settings.chunk == 0 or part.lo == voxels for part in parts)


def test_unmoved_particles_stay_in_the_middle_of_their_cells() -> None:
    slabs, settings = Slabs(8), Settings(voxels=4, particles=2, assignment="ngp")
    still = positions(settings, slabs, lambda row: np.zeros((8, 5), np.complex128))
    assert np.array_equal(unpacked(still, 1)[3, :, 2], (np.arange(8) + 0.5) * STEPS / 2)
    assert (counts(settings, Interval(0, 4), still.reshape(-1)) == 8).all()


def counted(settings: Settings, key: int, redshift: float) -> tuple[np.ndarray, np.ndarray]:
    """The density contrast of particles [N, N, N], and that of the linear field they were moved by."""
    slabs = Slabs(settings.grid)
    modes = gaussian_modes(slabs, key, power_spectrum(PARAMETERS, "eh"), settings.box_mpc)
    packed = positions(settings, slabs, potential(slabs, modes, None, PARAMETERS.omega_m, redshift))
    linear = slabs.backward(lambda row: modes[:, row].copy())
    planes = Interval(0, settings.voxels)
    return contrast(counts(settings, planes, packed.reshape(-1))), linear


def test_the_spectrum_of_early_particles_is_the_linear_one() -> None:
    """Little has moved at z = 9: the spectrum is D_1² P within cosmic variance, and mode by mode that of the field."""
    settings = Settings(voxels=64, box_mpc=512, assignment="cic")
    found, linear = counted(settings, 3, 9.0)
    modes, grown = Modes(64, 512.0), growth(PARAMETERS.omega_m, 9.0) ** 2
    spectrum = modes.mean(np.abs(np.fft.rfftn(found) / modes.cloud()) ** 2) * 512.0**3 / 64**6 / grown
    large = modes.count.cumsum() < 4000  # there neither the lattice nor the second order counts
    same = spectrum / modes.power(linear)
    assert np.abs(same[large] - 1).max() < 0.05
    deviation = (spectrum / modes.of(power_spectrum(PARAMETERS, "eh")) - 1) * np.sqrt(modes.count / 2)
    assert abs((deviation[large] ** 2).sum() - large.sum()) < 4 * math.sqrt(2 * large.sum())


@pytest.mark.parametrize("assignment", ["ngp", "cic"])
def test_the_spectrum_of_particles_today_is_linear_on_the_largest_scales(assignment: str) -> None:
    """k < 0.06 h/Mpc in a box of 1,024 Mpc/h: cosmic variance, and 6 % for what second order takes there."""
    settings = Settings(voxels=64, box_mpc=1024, particles=2, assignment=assignment)
    found, _ = counted(settings, 4, 0.0)
    modes = Modes(64, 1024.0)
    window = modes.cloud() if assignment == "cic" else np.sqrt(modes.cloud())
    spectrum = modes.mean(np.abs(np.fft.rfftn(found) / window) ** 2) * 1024.0**3 / 64**6
    ratio = spectrum / modes.of(power_spectrum(PARAMETERS, "eh"))
    large = np.arange(9)
    assert (np.abs(ratio[large] - 1) < 0.06 + 4 * np.sqrt(2 / modes.count[large])).all()
    mean = np.average(ratio[large], weights=modes.count[large])
    assert abs(mean - 1) < 0.06 + 4 * math.sqrt(2 / modes.count[large].sum())


def test_a_zeldovich_wave_has_the_density_of_its_caustic() -> None:
    """Of a plane wave the density is 1 / (1 - A cos q) until paths cross: exact to all orders."""
    settings, amplitude = Settings(voxels=16, particles=8), 0.6
    slabs = Slabs(settings.grid)
    # one row of particles is enough: the others are alike, and too many for a test
    q = (np.arange(slabs.size) + 0.5) / slabs.size
    moved = q - amplitude / (2 * math.pi) * np.sin(2 * math.pi * q)
    edges = np.linspace(0, 1, settings.voxels + 1)
    wanted = np.diff(np.interp(edges, moved, np.arange(slabs.size) + 0.5))
    wave = np.zeros((slabs.size, slabs.half), np.complex128)
    wave[1, 0] = wave[-1, 0] = amplitude / 2 * slabs.size**3

    def row(j: int) -> np.ndarray:
        return wave if j == 0 else np.zeros_like(wave)

    packed = positions(settings, slabs, row)[:, 0, 0]
    found = np.bincount(unpacked(packed, 0) // STEPS, minlength=settings.voxels)
    inside = slice(1, -1)
    assert np.abs(found - wanted)[inside].max() <= 1.5  # a particle on either side of an edge
