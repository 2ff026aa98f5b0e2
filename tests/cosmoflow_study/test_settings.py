"""Settings are read strictly; every size sees as many voxels a step; plan files load and fit."""

from __future__ import annotations

import pytest
import worlds
import yaml

import meshwright as mw
from cosmostudy import plans, settings
from cosmostudy.settings import RECIPES, Study
from cosmostudy.training import LEAST, Training, learning_rate, trainings
from meshwright import config
from meshwright.errors import ConfigError


def test_what_is_printed_can_be_read_again() -> None:
    study = settings.load(True, None, ["train.recipe=original", "seeds=[4, 5]"])
    assert config.read(Study, yaml.safe_load(study.yaml()), "test") == study
    assert study.recipe == RECIPES["original"]


def test_every_size_sees_as_many_voxels() -> None:
    study = Study()
    for size in study.sizes:
        seen = study.steps(size) * study.batch(size) * size**3
        assert seen == study.train.epochs * study.data.train * study.data.voxels**3
    assert [study.batch(size) for size in study.sizes] == [
        16 * study.train.batch,
        4 * study.train.batch,
        study.train.batch,
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "did you mean train.epochs"),
        ("sizes=[16, 24]", "16, 32, 64, 128, 256, 512 voxels a side, not 24"),
        ("sizes=[128]", "universes of 64³ voxels do not fall into cubes of 128³"),
        ("sizes=[32, 16]", "the smallest first"),
        ("plain=128", "none of the sizes"),
        ("seeds=[1, 1]", "name each seed once"),
        ("train.epochs=0", "at least 1"),
        ("train.lr", "write it as section.key=value"),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        settings.load(settings=[setting])


def test_a_study_scales_by_settings_alone() -> None:
    study = settings.load(
        settings=["data.voxels=512", "sizes=[128, 256, 512]", "plain=256", "train.batch=64", "network.width=16",
                  f"split.largest={plans.FOLDER}/2048.yaml", f"split.others={plans.FOLDER}/512.yaml"]
    )  # fmt: skip
    assert (study.plan(512).ranks, study.plan(256).ranks) == (2048, 512)
    assert [study.batch(size) for size in study.sizes] == [1024, 256, 64]


def test_the_small_study_has_every_part() -> None:
    names = ["32-seed3", "16-seed3", "16-plain-seed3", "32-seed4", "16-seed4", "16-plain-seed4"]
    assert [one.name for one in trainings(worlds.small("seeds=[3, 4]"))] == names
    assert str(Training(16, 3, False)) == "16³ seed 3 without batch norm"


def test_rates_of_both_recipes() -> None:
    figure, original = RECIPES["figure"], RECIPES["original"]
    rates = [learning_rate(figure, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(figure.lr)
    assert rates.index(max(rates)) == 29
    assert rates[-1] < 1e-5 * figure.lr
    assert learning_rate(original, 0, 100) == original.lr
    assert learning_rate(original, 99, 100) == pytest.approx(LEAST * original.lr)
    halfway = (learning_rate(original, 49, 100) + learning_rate(original, 50, 100)) / 2
    assert halfway == pytest.approx(original.lr * (1 + LEAST) / 2)


@pytest.mark.parametrize("ranks", plans.RANKS)
def test_plan_files_are_those_of_the_function_and_fit(ranks: int) -> None:
    plan = mw.Plan.load(plans.FOLDER / f"{ranks}.yaml")
    assert plan == plans.plan_for(ranks)
    assert plan.ranks == ranks
    for size in (128, 256, 512):
        shape = (plans.BATCH, 4, size, size, size)
        parts = {
            tuple(span.stop - span.start for span in mw.interval(shape, plan, rank))
            for rank in (0, ranks // 2, ranks - 1)
        }
        ((samples, _, *space),) = parts  # all alike
        assert samples * space[0] * space[1] * space[2] * ranks == plans.BATCH * size**3
        assert min(space) >= 16


def test_another_number_of_ranks_has_no_plan_file() -> None:
    with pytest.raises(ValueError, match="12 ranks: plans are made for 8, 16"):
        plans.plan_for(12)
    with pytest.raises(ConfigError, match="cannot read the settings"):
        settings.load(file="nowhere.yaml")
