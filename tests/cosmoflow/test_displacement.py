"""Displacements against waves whose displacement is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cosmology import growth, growth_second
from displacement import AXES, component, potential, second_source
from slabs import Complex, Slabs

SIZE, OMEGA_M = 24, 0.3
X = np.arange(SIZE)[:, None, None] / SIZE * 2 * math.pi
Y = np.arange(SIZE)[None, :, None] / SIZE * 2 * math.pi
Z = np.arange(SIZE)[None, None, :] / SIZE * 2 * math.pi
SLABS = Slabs(SIZE)


def modes_of(contrast: np.ndarray) -> Complex:
    whole = np.broadcast_to(contrast, (SIZE, SIZE, SIZE))
    return SLABS.forward(lambda plane: whole[plane])


def moved(contrast: np.ndarray, redshift: float, order: int) -> np.ndarray:
    """Displacements [3, N, N, N], in units of the box's edge / 2π."""
    modes = modes_of(contrast)
    second = second_source(SLABS, modes) if order == 2 else None
    rows = potential(SLABS, modes, second, OMEGA_M, redshift)
    return np.stack([component(SLABS, rows, axis) for axis in AXES]) * 2 * math.pi


def space(modes: Complex) -> np.ndarray:
    return SLABS.backward(lambda row: modes[:, row].copy())


def test_there_and_back_is_numpys_transform() -> None:
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE, SIZE))
    modes = modes_of(values)
    assert np.abs(modes - np.fft.rfftn(values)).max() < 1e-10
    assert np.abs(space(modes) - values).max() < 1e-13


@pytest.mark.parametrize("n", [(1, 0, 0), (0, 3, 0), (0, 0, 5), (2, -1, 3), (-4, 4, 1)])
@pytest.mark.parametrize("redshift", [0.0, 1.5])
def test_zeldovich_of_a_plane_wave(n: tuple[int, int, int], redshift: float) -> None:
    """δ = A cos(n·q) is moved by ψ = -A n/|n|² sin(n·q): then -∇·ψ = δ. To second order nothing is added."""
    phase = n[0] * X + n[1] * Y + n[2] * Z + 0.3
    wanted = np.stack([-0.7 * growth(OMEGA_M, redshift) * n[i] / np.dot(n, n) * np.sin(phase) for i in AXES])
    for order in (1, 2):
        assert np.abs(moved(0.7 * np.cos(phase), redshift, order) - wanted).max() < 1e-14


def test_the_second_order_source_of_a_plane_wave_is_0() -> None:
    assert np.abs(space(second_source(SLABS, modes_of(np.cos(2 * X - Y + 3 * Z))))).max() < 1e-14


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3)])
def test_second_order_of_two_crossed_waves(m: int, n: int) -> None:
    """δ = A cos mx + B cos ny has the source A B cos mx cos ny, and D_2 ∇φ follows."""
    a, b, redshift = 0.5, 0.8, 0.5
    crossed = moved(a * np.cos(m * X) + b * np.cos(n * Y), redshift, 2) - moved(
        a * np.cos(m * X) + b * np.cos(n * Y), redshift, 1
    )
    factor = growth_second(OMEGA_M, redshift) * a * b / (m**2 + n**2)
    whole = np.ones((SIZE, SIZE, SIZE))
    assert np.abs(crossed[0] - factor * m * np.sin(m * X) * np.cos(n * Y) * whole).max() < 1e-14
    assert np.abs(crossed[1] - factor * n * np.cos(m * X) * np.sin(n * Y) * whole).max() < 1e-14
    assert np.abs(crossed[2]).max() < 1e-14


def test_second_order_of_oblique_waves() -> None:
    """Of two waves p and q the source is A B (1 - (p·q)²/p²q²) cos p·x cos q·x: mixed derivatives count."""
    p, q = np.array([1, 2, 0]), np.array([2, 1, -1])
    first, other = np.cos(X + 2 * Y), np.cos(2 * X + Y - Z)
    angle = np.dot(p, q) ** 2 / (np.dot(p, p) * np.dot(q, q))
    source = space(second_source(SLABS, modes_of(0.4 * first + 0.9 * other)))
    assert np.abs(source - 0.36 * (1 - angle) * first * other).max() < 1e-14


@pytest.mark.parametrize("axis", AXES)
def test_the_highest_wave_number_moves_nothing_along_itself(axis: int) -> None:
    """Its samples are +1, -1, …: which way its slope goes is not known. Along the other dims it is a wave like any."""
    places = (X, Y, Z)
    sign, wave = np.cos(SIZE // 2 * places[axis]), places[(axis + 1) % 3]
    found = moved(sign * np.cos(2 * wave), 0.0, 1)
    assert np.abs(found[axis]).max() < 1e-15
    wanted = -2 / ((SIZE // 2) ** 2 + 4) * sign * np.sin(2 * wave)
    assert np.abs(found[(axis + 1) % 3] - wanted).max() < 1e-15
