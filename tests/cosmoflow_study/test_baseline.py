"""The linear fit that stands beside the network: what it looks at, and that it finds what is linear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import worlds

from cosmostudy import baseline
from cosmostudy.cubes import Cubes


def test_features_do_not_depend_on_where_and_how_a_cube_lies() -> None:
    counts = np.random.default_rng(0).poisson(1.5, (3, 2, 16, 16, 16)).astype(np.int16)
    found = baseline.features(counts)
    assert found.shape[0] == 3
    assert baseline.features(np.roll(counts, (3, 5), (2, 4))) == pytest.approx(found)
    assert baseline.features(np.flip(counts, 3).transpose(0, 1, 4, 2, 3)) == pytest.approx(found)
    assert np.abs(baseline.features(2 * counts) - found).max() > 0.1


def test_a_cube_has_the_spectrum_of_its_wave() -> None:
    at = np.arange(16)
    wave = (100 + np.round(50 * np.cos(2 * np.pi * 5 * at / 16))).astype(np.int16)
    cube = np.broadcast_to(wave[:, None, None], (1, 1, 16, 16, 16))
    spectrum = baseline.features(cube)[0, 1:]
    shells = spectrum[: int(np.flatnonzero(spectrum[1:] > 1e6)[0])] if spectrum.max() > 1e6 else spectrum[:12]
    others = np.delete(shells, shells.argmax())
    assert shells.max() > others.max() + 4  # all the power is in one shell


def test_the_fit_finds_a_linear_relation_and_no_more() -> None:
    generator = np.random.default_rng(1)
    numbers = generator.normal(size=(200, 2, 5))
    numbers[:, 1] = numbers[:, 0]  # the cubes of a universe say the same
    targets = np.stack([numbers[:, 0, 0], numbers[:, 0] @ [0, 1, 2, 0, 0], generator.normal(size=200), np.ones(200)], 1)
    said = baseline.fitted(numbers[:150], targets[:150], 1e-6, numbers[150:])
    assert said.shape == (50, 2, 4)
    error = ((said - targets[150:, None]) ** 2).mean((0, 1))
    assert error[[0, 1, 3]] == pytest.approx(0, abs=1e-9)
    assert error[2] > 0.5
    tight = baseline.fitted(numbers[:150], targets[:150], 1e9, numbers[150:])
    assert tight == pytest.approx(np.broadcast_to(targets[:150].mean(0), tight.shape), abs=1e-4)


def test_errors_are_found_once(universes: Path, tmp_path: Path) -> None:
    study = worlds.small()
    first = baseline.fit(study, str(universes), tmp_path)
    assert {size: one.cube.shape for size, one in first.items()} == dict.fromkeys((16, 32), (1, worlds.TEST, 4))
    again = baseline.fit(study, "nowhere", tmp_path)
    assert all(np.array_equal(first[size].cube, again[size].cube) for size in first)
    source = Cubes(universes, 16, 0, 1)
    assert baseline.of(source).shape[:2] == (1, 8)
