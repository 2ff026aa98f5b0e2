"""A sample that one rank cannot read is left out by all of them; the next one takes its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from meshwright.cluster.launch import launch
from meshwright.data.counted import Counted
from meshwright.data.dataset import DatasetSource
from meshwright.errors import DataError, RankError
from meshwright.train import loop, rundir
from meshwright.train.skipping import agreed, replaced
from training_jobs import build_on_own_files, job, last, losses, train

SHAPE = (12, 8, 8)
COUNT = 4


def write(folder: Path) -> list[str]:
    """Samples in chunks that end where two ranks are cut; returns the settings of a job on them."""
    folder.mkdir()
    random = np.random.default_rng(1)
    for case in range(COUNT):
        image = random.normal(size=SHAPE).astype(np.float32)
        group = zarr.open_group(folder / f"{case}.zarr", mode="w")
        group.create_array("image", data=image, chunks=(6, 8, 8))
        group.create_array("label", data=(image > 0.5).astype(np.uint8), chunks=(6, 8, 8))
    return [
        f"data.path={folder}",
        "data.classes=[dark, bright]",
        "data.intensity=[0, 1]",
        "model.base=4",
        "model.levels=2",
        "train.steps=4",
        "train.batch=2",
        "train.validate_every=0",
        "threads=1",
    ]


def damage(folder: Path, case: int) -> None:
    """Cut the chunk that only the second rank reads."""
    path = folder / f"{case}.zarr/image/c/1/0/0"
    path.write_bytes(path.read_bytes()[:-5])


def test_what_one_rank_cannot_read_all_leave_out(tmp_path: Path) -> None:
    settings = write(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "same")
    damage(tmp_path / "data", 1)
    shutil.rmtree(tmp_path / "same/1.zarr")
    shutil.copytree(tmp_path / "same/2.zarr", tmp_path / "same/1.zarr")
    with pytest.raises(RankError, match=r"1.zarr/image: truncated or damaged"):
        train(job(settings, ranks=2), tmp_path / "stopped")
    train(job(settings, "data.on_bad=skip", ranks=2), tmp_path / "a")
    train(job(settings, f"data.path={tmp_path}/same", ranks=2), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [json.loads((tmp_path / run / "summary.json").read_text())["left_out"] for run in "ab"] == [1, 0]


def test_ranks_that_see_other_files_do_not_train(tmp_path: Path) -> None:
    settings = write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/1.zarr")
    folders = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(RankError, match="what can be opened of the data differs between ranks"):
        launch(build_on_own_files, 2, (job(settings, ranks=2), folders), threads=1)


def test_a_run_that_goes_on_with_other_samples_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = write(tmp_path / "data")
    train(job(settings, "train.steps=1"), tmp_path / "run")
    assert last(tmp_path / "run").extra["samples"].startswith(f"{COUNT - 1} (")
    shutil.copytree(tmp_path / "data/1.zarr", tmp_path / "data/0a.zarr")
    again = job(settings, "train.steps=2")
    rundir.prepare(tmp_path / "run", resume=True)
    launch(loop.run, 1, (again, str(tmp_path / "run"), True), threads=1)
    assert "other samples than before: 3 (" in " ".join(capfd.readouterr().out.split())


def test_the_next_one_takes_its_place() -> None:
    image = np.zeros((2, 2, 2), np.float32)
    reads = Counted(DatasetSource([(image, image)] * 4))  # type: ignore[arg-type]
    reads.left_out = {1: "", 3: ""}
    assert replaced((0, 1, 2, 3), reads) == (0, 2, 2, 0)


def test_only_the_fault_of_a_sample_is_forgiven() -> None:
    image = np.zeros((2, 2, 2), np.float32)
    items = [(image, image), (image[:1], image[:1])]
    reads = Counted(DatasetSource(items))  # type: ignore[arg-type]
    box = (slice(0, 2),) * 3
    assert agreed(reads, lambda: reads.read(0, box), together=False) is not None
    assert agreed(reads, lambda: reads.read(1, box), together=False) is None
    assert "has shape (1, 2, 2)" in reads.left_out[1]

    def other() -> None:
        raise DataError("a batch of different sizes")

    with pytest.raises(DataError, match="different sizes"):
        agreed(reads, other, together=False)
    reads = Counted(DatasetSource([items[0]]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"none of the 1 samples can be read; the last one: list\[0\]: .*the box"):
        agreed(reads, lambda: reads.read(0, (slice(0, 3),) * 3), together=False)


def test_each_failure_of_a_sample_is_its_fault_however_often_it_failed_since() -> None:
    image = np.zeros((2, 2, 2), np.float32)
    reads = Counted(DatasetSource([(image, image)] * 2))  # type: ignore[arg-type]
    errors = []
    for _ in range(3):  # read ahead for several steps
        with pytest.raises(DataError) as caught:
            reads.read(1, (slice(0, 3),) * 3)
        errors.append(caught.value)
    assert [reads.blamed(error) for error in errors] == [1, 1, 1]
    assert reads.blamed(DataError("another")) == -1
