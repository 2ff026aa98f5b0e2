"""Phantoms are functions of seed, number and position; the study around them counts what it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fits
import meshwright as mw
import phantom
import study
from phantom_files import write, write_all


def test_planes_are_those_of_the_whole_volume() -> None:
    image, label = phantom.planes(3, 1, 32, 0, 32)
    for first, last in ((0, 1), (5, 19), (19, 32)):
        part = phantom.planes(3, 1, 32, first, last)
        np.testing.assert_array_equal(part[0], image[first:last])
        np.testing.assert_array_equal(part[1], label[first:last])


def test_a_patient_looks_as_described() -> None:
    """Tumours are darker than the liver around them; the spleen is as bright as the liver and has no label."""
    for index in range(5):
        image, label = phantom.planes(0, index, 48, 0, 48)
        assert set(np.unique(label)) == {0, 1, 2}
        liver, tumour = image[label == 1].mean(), image[label == 2].mean()
        assert abs(liver - phantom.ORGAN) < 5
        assert abs(tumour - phantom.DARK) < 10
        assert 0.02 < (label > 0).mean() < 0.15
        spleen = image[20:24, 24:28, 35:38], label[20:24, 24:28, 35:38]
        assert not spleen[1].any()
        assert spleen[0].max() > liver
        assert label[:, :, :24].sum() > label[:, :, 24:].sum()  # the liver is on its side


def test_the_same_patient_at_another_size() -> None:
    _, small = phantom.planes(0, 2, 24, 0, 24)
    _, large = phantom.planes(0, 2, 72, 0, 72)
    assert (large[1::3, 1::3, 1::3] == small).mean() == 1  # the middle voxel of three lies at the same place


def test_seeds_and_numbers_differ() -> None:
    volumes = [phantom.planes(seed, index, 16, 0, 16)[0] for seed in (0, 1) for index in (0, 1)]
    assert all((a != b).mean() > 0.5 for i, a in enumerate(volumes) for b in volumes[:i])


def test_files_are_whole_or_absent_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_all(tmp_path, 2, 20, seed=5)
    image, label = phantom.planes(5, 1, 20, 0, 20)
    np.testing.assert_array_equal(np.load(folder / "images" / "phantom_0001.npy"), image)
    np.testing.assert_array_equal(np.load(folder / "labels" / "phantom_0001.npy"), label)

    def dies(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("phantom_files.planes", dies)
    write(folder, 1, 20, 5)  # is there
    with pytest.raises(KeyboardInterrupt):
        write(folder, 2, 20, 5)
    assert sorted(path.name for path in folder.glob("images/p*")) == ["phantom_0000.npy", "phantom_0001.npy"]


@pytest.mark.parametrize("edge", [16, 32, 64])
def test_every_size_sees_as_many_voxels(edge: int) -> None:
    args = study.parse(["--ranks", "4", "--set", "optim.lr=0.02"])
    words = study.command(study.Training(edge, 1), args, Path("data"))
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    batch = int(settings["train.batch"])
    assert batch * edge**3 == args.size**3
    assert settings.get("augment.patch") == (None if edge == 64 else f"[{edge}, {edge}, {edge}]")
    assert settings["plan.depth" if edge == 64 else "plan.data"] == "4"
    assert words[-1] == "optim.lr=0.02"  # the user's settings come last


def test_the_law_can_fail() -> None:
    assert study.law({16: [0.5, 0.52], 64: [0.8, 0.82]}) is None
    assert "is 0.010, the error bars are 0.100" in str(study.law({16: [0.5, 0.6], 64: [0.51, 0.61]}))
    assert study.law({16: [0.8], 64: [0.5]}) is not None


@pytest.mark.parametrize("words", [["--edges", "12"], ["--edges", "48"], ["--ranks", "16", "--edges", "32"]])
def test_sizes_that_do_not_fit_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.parse(words)
    assert "--edges" in capsys.readouterr().err


def test_parts_of_a_phantom_train_as_the_whole() -> None:
    whole, parts = (mw.launch(fits.step, ranks, (16, 2, ranks, None))[0][0] for ranks in (1, 2))
    assert math.isclose(whole, parts, rel_tol=1e-5)
