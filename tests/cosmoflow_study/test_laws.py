"""The arithmetic of errors and their bars, and that a broken law is called broken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cosmostudy.laws import Errors, Value, difference, laws, with_bar


def errors(level: float, seeds: int = 3, universes: int = 200, seed: int = 0, sigma_8: float | None = None) -> Errors:
    """Squared errors around `level` (σ_8: around its own), the same for cubes and universes."""
    generator = np.random.default_rng(seed)
    values = level * generator.chisquare(4, (seeds, universes, 4)) / 4
    if sigma_8 is not None:
        values[..., 1] *= sigma_8 / level
    return Errors(values, values)


def test_errors_of_cubes_and_of_their_mean() -> None:
    truth = np.array([[0.0, 1, 0, 0]])
    predicted = np.array([[[1.0, 1, 0, 0.5], [-1.0, 3, 0, 0.5]]])  # one universe, two cubes
    found = Errors.of([predicted, predicted], truth)
    assert found.cube.tolist() == [[[1, 2, 0, 0.25]]] * 2
    assert found.universe.tolist() == [[[0, 1, 0, 0.25]]] * 2


def test_the_bar_over_universes_is_the_deviation_of_their_mean() -> None:
    values = np.random.default_rng(1).normal(5, 2, (1, 400))
    found = with_bar(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.bar == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_the_bar_over_seeds_is_the_deviation_of_their_mean() -> None:
    values = np.array([[1.0] * 50, [2.0] * 50, [3.0] * 50])  # universes do not differ at all
    assert with_bar(values).bar == pytest.approx(1.96 * 1 / math.sqrt(3))
    assert difference(values, values).bar == pytest.approx(1.96 * math.sqrt(2 / 3))


def test_a_difference_draws_the_same_universes_for_both() -> None:
    hard = np.random.default_rng(2).normal(5, 3, (1, 100))
    found = difference(hard + 0.1, hard)
    assert (found.mean, found.bar) == (pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    assert with_bar(hard).bar > 0.4


def test_laws_hold_where_larger_is_better() -> None:
    found = laws(
        {
            (16, True): errors(0.30, sigma_8=0.14),
            (32, True): errors(0.25, seed=1, sigma_8=0.07),
            (64, True): errors(0.20, seed=2, sigma_8=0.03),
            (32, False): errors(0.33, seed=3),
        }
    )
    assert [law.holds for law in found] == [True] * 4
    assert [law.text.split(" ")[0] for law in found] == ["σ_8", "σ_8", "the", "batch"]


@pytest.mark.parametrize("broken", range(4))
def test_each_law_can_break(broken: int) -> None:
    sigma_8 = [0.14, 0.07, 0.03]
    levels = [0.30, 0.25, 0.20]
    plain = 0.33
    if broken == 0:
        sigma_8 = [0.07, 0.07, 0.03]
    elif broken == 1:
        sigma_8 = [0.14, 0.07, 0.07]
    elif broken == 2:
        levels = [0.20, 0.25, 0.30]
    else:
        plain = 0.2
    found = laws(
        {
            **{
                (16 << at, True): errors(level, seed=at, sigma_8=own)
                for at, (level, own) in enumerate(zip(levels, sigma_8, strict=True))
            },
            (32, False): errors(plain, seed=1),
        }
    )
    assert [not law.holds for law in found] == [number == broken for number in range(4)]
    assert str(found[broken]).startswith("BROKEN")


def test_an_improvement_within_its_bar_does_not_count() -> None:
    few = {(16, True): errors(0.30, universes=8), (32, True): errors(0.29, universes=8, seed=1)}
    assert not any(law.holds for law in laws(few))
    assert Value(0.2, 0.1).is_positive
    assert not Value(0.1, 0.1).is_positive


def test_laws_need_two_sizes() -> None:
    assert laws({(64, True): errors(0.2)}) == []
