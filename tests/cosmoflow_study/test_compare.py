"""Two studies are compared universe by universe, and only where they held out the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import worlds

from cosmostudy import compare, settings, study
from cosmostudy.training import PREDICTIONS, RESULT
from meshwright.errors import ConfigError

TRUTH = np.random.default_rng(0).uniform(-1, 1, (40, 4))


def written(out: Path, off: float, truth: np.ndarray = TRUTH, *more: str) -> list[study.Finished]:
    """A study of cubes of 16³ whose every prediction is wrong by `off` times the same numbers."""
    wanted = worlds.small("sizes=[16]", "plain=null", "seeds=[0, 1]", *more)
    noise = np.random.default_rng(1).normal(size=(40, 8, 4))
    for seed in wanted.seeds:
        folder = out / study.TRAININGS / f"16-seed{seed}"
        folder.mkdir(parents=True)
        (folder / RESULT).write_text("{}")
        np.savez(folder / PREDICTIONS, predicted=truth[:, None] + off * noise, truth=truth)
    (out / study.STUDY).write_text(wanted.yaml(), encoding="utf-8")
    return study.finished(wanted, out)


def test_the_difference_is_between_the_same_universes(tmp_path: Path) -> None:
    found = written(tmp_path / "ours", 0.1)
    written(tmp_path / "theirs", 0.3, TRUTH, "train.epochs=7")
    text = compare.against(found, tmp_path / "theirs")
    squares = (np.random.default_rng(1).normal(size=(40, 8, 4)) ** 2).mean()
    assert f"| 16³ | {0.09 * squares:.3f} | {0.01 * squares:.3f} | {0.08 * squares:.3f} ± 0.0" in text
    assert "| 0.000 ± 0.000 | 0.000 ± 0.000 |" in compare.against(found, tmp_path / "ours")


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    found = written(tmp_path / "ours", 0.1)
    written(tmp_path / "others", 0.1, TRUTH[::-1].copy())
    with pytest.raises(ConfigError, match=r"held out other universes; data\.test, data\.test_from"):
        compare.against(found, tmp_path / "others")
    with pytest.raises(ConfigError, match=r"there is no .*study\.yaml"):
        compare.against(found, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / study.STUDY).write_text(worlds.small().yaml(), encoding="utf-8")
    with pytest.raises(ConfigError, match="no training of the same size"):
        compare.against(found, tmp_path / "empty")


def test_universes_held_out_need_not_follow_those_that_train() -> None:
    wanted = settings.load(settings=["data.train=256", "data.test_from=1024"])
    assert (wanted.data.first_test, wanted.data.count) == (1024, 1152)
    assert (settings.Study().data.first_test, settings.Study().data.count) == (1024, 1152)
    with pytest.raises(ConfigError, match=r"data\.test_from = 100: universes before 1024 train"):
        settings.load(settings=["data.test_from=100"])
