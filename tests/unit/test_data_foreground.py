"""Foreground found slab by slab is that of the whole label, and patches of the main job lie around it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.launch import launch
from meshwright.data import arrays, foreground, patches
from meshwright.data.folder import find_pairs
from meshwright.data.foreground import Foreground, boxes_in
from meshwright.data.source import ReadStats, VolumeSource, Wrapped
from meshwright.data.volumes import make_pairs
from meshwright.errors import ConfigError, RankError
from meshwright.plan.plan import Plan
from meshwright.train import rundir
from meshwright.train.batches import training_batch
from meshwright.train.job import build, recipe
from training_jobs import job, losses, train
from training_store_jobs import foreground_found, train_without_label

SHAPE = (37, 20, 33)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_slabs_of_any_thickness_give_the_boxes_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 40)) for _ in range(3))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    label = (random.random(shape) < data.draw(st.sampled_from([0.0, 0.001, 0.05]))).astype(np.uint8)
    cuts = sorted({0, shape[0], *data.draw(st.lists(st.integers(0, shape[0]), max_size=4))})
    found = boxes_in((lo, label[lo:hi]) for lo, hi in pairwise(cuts))
    want = patches.boxes_of(torch.from_numpy(label), foreground.CELL)
    assert found == [[[span.start, span.stop] for span in box] for box in want]


def sparse() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[30:33, 4, 20:22] = 1
    label[15:17, 15:17, 31] = 2
    return label


def nifti(folder: Path, label: np.ndarray) -> None:
    nibabel.Nifti1Image(label.T, np.eye(4)).to_filename(folder / "a_label.nii.gz")


def npy(folder: Path, label: np.ndarray) -> None:
    np.save(folder / "a_label.npy", label[None].astype(np.float64))


def hdf5(folder: Path, label: np.ndarray) -> None:
    with h5py.File(folder / "a_label.h5", "w") as file:
        file.create_dataset("label", data=label, chunks=(5, 7, 9))


def zarrs(folder: Path, label: np.ndarray) -> None:
    zarr.create_array(folder / "a_label.zarr", data=label, chunks=(6, 20, 33))


class Plain(Wrapped):
    """A source of which nobody knows the files."""

    def read(self, index: int, spans: Any) -> Any:
        return self._source.read(index, spans)


@pytest.mark.parametrize("write", [nifti, npy, hdf5, zarrs])
def test_every_format_gives_the_boxes_of_the_whole(
    write: Callable[[Path, np.ndarray], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "SLAB_BYTES", 8000)
    monkeypatch.setattr(foreground, "SLAB_BYTES", 2000)
    label = sparse()
    np.save(tmp_path / "a_image.npy", np.random.default_rng(0).normal(size=SHAPE))
    write(tmp_path, label)
    source, want = make_pairs(find_pairs(tmp_path), ("0", "1", "2")), patches.boxes_of(torch.from_numpy(label), 16)
    assert len(want) == 5  # two in two cells each way, one of these in the cell of a third
    spent: list[ReadStats] = []
    found = Foreground(source, spent.append)
    assert found.boxes(0) == found.boxes(0) == want
    assert label.nbytes <= sum(stats.read_bytes for stats in spent) <= 8 * label.nbytes + 1000
    plain: VolumeSource = Plain(source)
    assert Foreground(plain).boxes(0) == want
    assert launch(foreground_found, 2, (str(tmp_path),)) == [want] * 2


def pairs(folder: Path) -> list[str]:
    """Labels of one bright corner each, which few patches anywhere would meet."""
    folder.mkdir()
    random = np.random.default_rng(3)
    for case in range(4):
        image = random.normal(size=(24, 22, 20)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[20:22, 3:5, 17:19] = 1
        np.save(folder / f"{case}_image.npy", image + 4 * label)
        np.save(folder / f"{case}_label.npy", label)
    return [
        *(f"data.path={folder}", "data.classes=[dark, bright]", "data.intensity=[0, 1]", "augment.patch=[8, 8, 8]"),
        *("model.base=4", "model.levels=2", "train.steps=6", "train.batch=2", "train.validate_every=0", "threads=1"),
    ]


def test_the_share_of_patches_around_foreground(tmp_path: Path) -> None:
    words = [*pairs(tmp_path / "data"), "train.steps=40"]
    shares = []
    for share in 0.0, 0.5, 1.0:
        ranks, _ = build(job(words, f"augment.patch_foreground={share}"), Plan.uniform(), split=False)
        hits = [bool(one.any()) for step in range(1, 41) for one in training_batch(ranks, step).label]
        shares.append(sum(hits) / len(hits))
    assert shares[0] < 0.2 < 0.4 < shares[1] < 0.75 < shares[2] == 1.0


def test_patches_around_foreground_are_the_same_whatever_the_plan(tmp_path: Path) -> None:
    words = [*pairs(tmp_path / "data"), "augment.patch_foreground=0.7", "train.precision=fp64"]
    for number, more in enumerate(((), ("plan.depth=2",), ("plan.data=2", "data.memory_mib=1"))):
        train(job(words, *more, ranks=1 + bool(more)), tmp_path / f"{number}")
        np.testing.assert_allclose(losses(tmp_path / f"{number}"), losses(tmp_path / "0"), rtol=1e-9)


def test_a_share_without_patches_is_refused(tmp_path: Path) -> None:
    words = pairs(tmp_path / "data")
    for wrong in (("augment.patch_foreground=1.5",), ("augment.patch_foreground=0.5", "augment.patch=null")):
        with pytest.raises(ConfigError, match=r"augment.patch_foreground = .*: a share from 0 to 1 of the patches"):
            recipe(job(words, *wrong))


PLANS = {"d2": ("plan.depth=2",), "n2": ("plan.data=2",), "d2, store": ("plan.depth=2", "data.memory_mib=1")}
PLANS["n2, store"] = ("plan.data=2", "data.memory_mib=1")
ORDINARY = ("d2", "n2, store")  # both plans, with the store and without
SOME_PLANS = [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.full) for name in PLANS]


@pytest.mark.parametrize("name", SOME_PLANS)
def test_a_label_that_cannot_be_read_for_it_is_left_out_by_all(name: str, tmp_path: Path) -> None:
    """Cases 1 and 2 of 7, one of 8 held out: a folder in which the next ones lie in their places trains the same."""
    words = [*zarr_pairs(tmp_path / "data"), "augment.patch_foreground=0.7", *PLANS[name]]
    shutil.copytree(tmp_path / "data", tmp_path / "same")
    for case in 1, 2:
        chunk = tmp_path / f"data/{case}.zarr/label/c/1/0/0"
        chunk.write_bytes(chunk.read_bytes()[:-5])
        shutil.rmtree(tmp_path / f"same/{case}.zarr")
        shutil.copytree(tmp_path / "same/3.zarr", tmp_path / f"same/{case}.zarr")
    with pytest.raises(RankError, match=r"[12].zarr/label: truncated or damaged"):
        train(job(words, ranks=2), tmp_path / "stopped")
    train(job(words, "data.on_bad=skip", ranks=2), tmp_path / "a")
    train(job(words, f"data.path={tmp_path}/same", ranks=2), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [json.loads((tmp_path / run / "summary.json").read_text())["left_out"] for run in "ab"] == [2, 0]


@pytest.mark.parametrize("name", SOME_PLANS)
def test_a_label_that_one_rank_cannot_read_is_left_out_by_all(name: str, tmp_path: Path) -> None:
    """As where hosts have disks of their own: rank 1 says no, and the ranks agree on what they draw."""
    words = [*zarr_pairs(tmp_path / "data"), "augment.patch_foreground=0.7", "data.on_bad=skip", *PLANS[name]]
    rundir.prepare(tmp_path / "run", resume=False)
    found = launch(train_without_label, 2, (job(words, ranks=2), str(tmp_path / "run"), 3), threads=1)
    assert [len(reasons) for reasons in found] == [1, 1]
    assert "another rank could not read it" in found[0][0]
    assert "the disk is gone" in found[1][0]
    assert len(losses(tmp_path / "run")) == 12


def zarr_pairs(folder: Path) -> list[str]:
    """`pairs` in Zarr, 8 of them, in chunks of which a damaged one is noticed."""
    words = pairs(folder)
    image, label = (np.load(folder / f"0_{name}.npy") for name in ("image", "label"))
    for file in folder.iterdir():
        file.unlink()
    for case in range(8):
        group = zarr.open_group(folder / f"{case}.zarr", mode="w")
        group.create_array("image", data=np.roll(image, case, 0), chunks=(12, 22, 20))
        group.create_array("label", data=np.roll(label, case, 0), chunks=(12, 22, 20))
    return [*words, "data.held_out=0.1", "train.steps=12", "train.precision=fp64"]
