"""Transforms of MONAI that a configuration names: the same on parts as on the whole, or refused before reading."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
import yaml
from test_augment_laws import see_law
from transform_draws import Reading, sample

from meshwright.data.chance import key
from meshwright.data.monai_named import MonaiNamed, named
from meshwright.data.recipe import Recipe
from meshwright.data.transforms import Compose, read
from meshwright.errors import ConfigError
from meshwright.train.job import recipe, settled, sources
from training_jobs import job, write_pairs

SHAPE = (7, 6, 5)
ACCEPTED: list[dict[str, Any]] = [
    {"name": "Identity"},
    {"name": "MapLabelValue", "orig_labels": [0], "target_labels": [0.5]},
    {"name": "NormalizeIntensity", "subtrahend": 0.1, "divisor": 1.7, "nonzero": True},
    {"name": "NormalizeIntensity", "subtrahend": [0.1, 0.2], "divisor": [1.7, 1.1], "channel_wise": True},
    {"name": "ScaleIntensity", "minv": None, "maxv": None, "factor": 0.1},
    {"name": "ScaleIntensityRange", "a_min": -2, "a_max": 2.0, "b_min": 0.0, "b_max": 1.0, "clip": True},
    {"name": "ScaleIntensityRange", "a_min": -2, "a_max": 3},
    {"name": "ShiftIntensity", "offset": 0.3},
    {"name": "SignalFillEmpty", "replacement": 0.5},
    {"name": "ThresholdIntensity", "threshold": 0.2, "above": False, "cval": -1.0},
    {"name": "RandShiftIntensity", "offsets": 0.5, "prob": 0.5},
    {"name": "RandShiftIntensity", "offsets": [0.1, 0.5], "prob": 1.0, "channel_wise": True},
    {"name": "RandScaleIntensity", "factors": [-0.5, 0.5], "prob": 0.7, "channel_wise": True},
]


@pytest.mark.parametrize("entry", ACCEPTED, ids=lambda entry: entry["name"])
def test_what_is_accepted_is_exact_on_parts_and_changes_the_image_alone(entry: dict[str, Any]) -> None:
    (step,) = named([entry], "here")
    step.see(2, "here")
    for number in range(6):
        drawn = step.at(key(3, number))
        whole = see_law(drawn, SHAPE, (2, 3, 2))
        before = sample(SHAPE)
        assert torch.equal(whole["label"], before["label"])
        assert torch.equal(whole["second"], before["second"])
        arguments = {name: value for name, value in entry.items() if name != "name"}
        theirs = getattr(mt, entry["name"])(**arguments)
        if step.is_random:
            theirs.set_random_state(seed=drawn.key % (1 << 32))
        assert torch.equal(whole["image"], torch.as_tensor(theirs(before["image"].clone())))
        assert type(whole["image"]) is torch.Tensor


def test_a_random_one_is_drawn_from_seed_and_place() -> None:
    shifts = named([{"name": "RandShiftIntensity", "offsets": 1.0, "prob": 0.5}] * 2, "here")
    ranges = Recipe(monai=shifts)
    assert not ranges.is_nothing
    assert ranges.fixed == Compose()

    def shift(seed: int, position: int) -> tuple[float, ...]:
        drawn = ranges.draw(seed, position, SHAPE)
        assert drawn == ranges.draw(seed, position, SHAPE)
        zero = {"image": torch.zeros(1, *SHAPE)}
        found = []
        for step in drawn.transforms:
            moved = read(step, lambda box: {"image": zero["image"][(..., *box)]}, [slice(0, n) for n in SHAPE], SHAPE)
            found += moved["image"].unique().tolist()
        assert len(found) == 2  # one number for all voxels
        return tuple(found)

    found = [shift(0, position) for position in range(400)]
    values = np.array(found)
    assert 0.4 < (values != 0).mean() < 0.6
    assert len(set(values[values != 0])) == (values != 0).sum()  # no two samples, and no two steps of one, alike
    assert values.min() < -0.9
    assert values.max() > 0.9
    assert [shift(1, position) for position in range(20)] != found[:20]


REFUSED = [
    ({"offset": 1.0}, "has no name"),
    ({"name": 3}, "has no name"),
    (
        {"name": "ShiftIntensty", "offset": 1.0},
        "'ShiftIntensty' is no transform of MONAI; did you mean ShiftIn",
    ),
    ({"name": "Zzz"}, "'Zzz' is no transform of MONAI; accepted are Identity, MapLabelValue"),
    ({"name": "__doc__"}, "is no transform of MONAI"),
    ({"name": "AdjustContrast", "gamma": 1.2}, "AdjustContrast cannot augment a split sample: it measures the array"),
    ({"name": "RandGaussianNoise"}, "RandGaussianNoise cannot .* generator of its own"),
    ({"name": "RandAdjustContrast"}, "RandAdjustContrast cannot .* generator of its own"),
    ({"name": "Flip", "spatial_axis": 0}, "Flip cannot .* moves voxels"),
    ({"name": "GaussianSmooth"}, "not known to change each voxel"),
    ({"name": "Lambda", "func": "print"}, "Lambda cannot .* not known"),
    ({"name": "ShiftIntensityd", "keys": "image"}, "dictionary"),
    ({"name": "CastToType", "dtype": "float16"}, "CastToType cannot .* train.precision decides"),
    (
        {"name": "ShiftIntensity", "offset": 1.0, "safe": True},
        "takes no argument 'safe' here; known: offset",
    ),
    ({"name": "Identity", "x": 1}, "Identity takes no argument 'x' here; known: none"),
    ({"name": "ShiftIntensity", "offset": "1"}, "offset = '1'; expected a number"),
    ({"name": "ShiftIntensity", "offset": True}, "offset = True; expected a number"),
    ({"name": "ShiftIntensity", "offset": float("nan")}, "offset = nan; expected a number"),
    ({"name": "ShiftIntensity"}, "ShiftIntensity: .*missing 1 required positional argument: 'offset'"),
    ({"name": "ScaleIntensityRange", "a_min": 0, "a_max": 1, "clip": 1}, "clip = 1; expected true or false"),
    ({"name": "ScaleIntensity", "factor": 0.1}, "ScaleIntensity cannot .* measures the array"),
    ({"name": "NormalizeIntensity"}, "NormalizeIntensity cannot .* measures .* give subtrahend and divisor"),
    ({"name": "NormalizeIntensity", "subtrahend": 0.1, "divisor": 1, "channel_wise": True}, "one a channel"),
    ({"name": "NormalizeIntensity", "subtrahend": [0.1], "divisor": 1}, "as numbers"),
    ({"name": "MapLabelValue", "orig_labels": [1, 2], "target_labels": [1]}, "must have the same length"),
    ({"name": "RandShiftIntensity", "offsets": [1, 2, 3]}, "pair of numbers"),
    ({"name": "RandShiftIntensity", "offsets": 1, "prob": 1.5}, "prob = 1.5; a probability is between 0 and 1"),
]


@pytest.mark.parametrize(("entry", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_everything_else_is_refused_before_anything_is_read(entry: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.monai\[1\].*{words}"):
        named([{"name": "Identity"}, entry], "augment.monai")
    if all(isinstance(value, str | int) for value in entry.values()):  # of the job: the folder does not even exist
        text = yaml.safe_dump([{"name": "Identity"}, entry], default_flow_style=True, width=10_000)
        with pytest.raises(ConfigError, match=words):
            sources(job([f"data.path={tmp_path}/nowhere", f"augment.monai={text}"]))


def test_what_does_not_fit_the_channels_is_refused_before_training(tmp_path: Path) -> None:
    entry = "{name: NormalizeIntensity, subtrahend: [0, 1], divisor: [1, 2], channel_wise: true}"
    settings = job(write_pairs(tmp_path), f"augment.monai=[{entry}]")
    with pytest.raises(ConfigError, match=r"augment.monai: NormalizeIntensity cannot be applied to 1 channel\(s\)"):
        settled(settings, sources(settings)[0])


def test_without_monai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai", None)
    assert recipe(job([])).monai == ()  # nothing is asked of it
    for entry in "{name: Identity}", "{name: Flip}":
        with pytest.raises(ConfigError, match=r"pip install 'meshwright\[monai\]'"):
            recipe(job([f"augment.monai=[{entry}]"]))


def test_a_step_is_a_value() -> None:
    first, second = (named([ACCEPTED[3]], "here") for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    reading = Reading(sample(SHAPE))
    part = read(MonaiNamed("Identity"), reading, [slice(0, n) for n in SHAPE], SHAPE, ("image", "label"))
    assert torch.equal(part["image"], reading.fields["image"])


def test_the_table_of_the_documents_names_what_is_accepted() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("| `name` in `augment.monai` |")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert names == {entry["name"] for entry in ACCEPTED}
    with pytest.raises(ConfigError, match="accepted are ") as caught:
        named([{"name": "Flip"}], "here")
    assert names == set(str(caught.value).partition("accepted are ")[2].split(", "))
