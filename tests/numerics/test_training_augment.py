"""Augmented training: the same batches to the bit whatever the plan, and one order of samples through a resize."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from augment_jobs import batches, fed, samples
from meshwright.cluster.launch import launch
from meshwright.data.recipe import Recipe
from meshwright.data.sampler import Sampler, Shuffled
from meshwright.data.transforms import Compose
from meshwright.errors import ConfigError, DataError
from meshwright.plan.plan import Plan
from meshwright.train.batches import held_out
from meshwright.train.feed import Feed
from meshwright.train.job import build, settled, sources
from training_jobs import job, last, train, write_pairs

EVERYTHING = (
    "augment.patch=[9, 9, 7]",
    "augment.rotate90=[depth, height]",
    "augment.permute=[depth, height]",
    "augment.roll=[width]",
    "augment.rotate_deg=10",
    "augment.zoom=0.1",
    "augment.elastic=1.5",
    "augment.elastic_spacing=8",
    "augment.gamma=0.3",
    "augment.noise=0.2",
    "train.precision=fp32",
    "data.intensity=[0.1, 1.5]",
)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_pairs(folder)


@pytest.mark.parametrize(
    ("ranks", "plan"), [(3, ("plan.depth=3",)), (4, ("plan.data=2", "plan.height=2", "train.batch=3"))]
)
def test_augmented_batches_are_the_same_bits_under_every_plan(
    data: list[str], ranks: int, plan: tuple[str, ...]
) -> None:
    settings = job(data, *EVERYTHING, *plan, ranks=ranks)
    expected = batches(settings, 4, split=False)
    assert launch(batches, ranks, (settings, 4), threads=1) == [expected] * ranks
    assert len({image for image, _, _ in expected}) == 4
    assert all(shape[2:] == (9, 9, 7) for _, _, shape in expected)


MONAI = (
    "augment.monai=[{name: ScaleIntensityRange, a_min: -3, a_max: 2, b_min: 0.1, b_max: 0.9, clip: true}, "
    "{name: RandShiftIntensity, offsets: 0.3, prob: 0.6}, {name: RandScaleIntensity, factors: 0.5, prob: 0.6}]"
)


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        (2, ("plan.depth=2",)),
        (2, ("plan.depth=2", "data.memory_mib=1")),
        (4, ("plan.data=2", "plan.height=2", "train.batch=3")),
    ],
)
def test_transforms_of_monai_are_the_same_bits_under_every_plan(
    data: list[str], ranks: int, plan: tuple[str, ...]
) -> None:
    settings = job(data, MONAI, "augment.elastic=1.5", "augment.elastic_spacing=8", "augment.noise=0.1", *plan)
    settings = replace(settings, ranks=ranks, train=replace(settings.train, precision="fp32"))
    expected = batches(replace(settings, data=replace(settings.data, memory_mib=None)), 4, split=False)
    assert launch(fed, ranks, (settings, 4), threads=1) == [expected] * ranks
    plain = batches(replace(settings, augment=replace(settings.augment, monai=())), 4, split=False)
    assert [label for _, label, _ in plain] == [label for _, label, _ in expected]
    assert not {image for image, _, _ in plain} & {image for image, _, _ in expected}


def test_held_out_samples_get_the_fixed_ones_alone(data: list[str]) -> None:
    plain = build(job(data, "train.precision=fp32"), Plan.uniform(), split=False)[0]
    scaled = build(job(data, MONAI, "train.precision=fp32"), Plan.uniform(), split=False)[0]
    before, after = (held_out(ranks, 0) for ranks in (plain, scaled))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after.image, ((before.image + 3) / 5 * 0.8 + 0.1).clamp(0.1, 0.9))
    assert torch.equal(after.label, before.label)


def test_a_resumed_run_with_another_batch_size_goes_on_in_the_same_order(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(job(data, "train.steps=3", "train.batch=1", "augment.noise=0.1"), run)
    assert last(run).extra["seen"] == 3
    bigger = job(data, "train.steps=5", "train.batch=2", "augment.noise=0.1")
    (four, five) = launch(samples, 1, (bigger, str(run), (4, 5)), threads=1)[0]
    stream = Sampler(Shuffled(len(sources(bigger)[0].names)), bigger.seed).batch(7)
    assert four + five == stream[3:]
    train(bigger, run, resume=True)
    assert last(run).extra["seen"] == 7


def test_an_augmentation_that_cannot_be_drawn_is_refused_before_training(data: list[str]) -> None:
    for setting, error, message in (
        ("augment.roll=[left]", ConfigError, "augment: 'left' is no dim"),
        ("augment.gamma_range=[1]", ConfigError, "augment.gamma_range = .* two numbers"),
        ("augment.rotate90=[depth, width]", DataError, "rotate90 needs dims of one size, not depth 13, width 8"),
        ("augment.patch=[16, 8, 8]", DataError, r"\(16, 8, 8\) voxels does not fit"),
    ):
        settings = job(data, setting)
        with pytest.raises(error, match=message):
            settled(settings, sources(settings)[0])


def test_what_is_drawn_knows_the_size_of_voxels(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "data").iterdir():
        values = np.asarray(nibabel.load(path).dataobj)
        nibabel.Nifti1Image(values, np.diag([1.0, 2.0, 5.0, 1.0])).to_filename(path)
    seen, draw = list[object](), Recipe.draw

    def noted(self: Recipe, *given: Any, **named: Any) -> Compose:
        seen.append(inspect.signature(draw).bind(self, *given, **named).arguments["spacing_mm"])
        return draw(self, *given, **named)

    monkeypatch.setattr(Recipe, "draw", noted)
    for memory in "null", "1":
        settings = job(data, "augment.rotate_deg=5", f"data.memory_mib={memory}")
        settled(settings, sources(settings)[0])
        with Feed(build(settings, Plan.uniform(), split=False)[0], 0, tmp_path) as feed:
            feed.batch(1)
        assert len(seen) >= 2
        assert set(seen) == {(5.0, 2.0, 1.0)}
        seen.clear()
