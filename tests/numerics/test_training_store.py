"""`data.memory_mib`: training through the store gives the bits of training without it, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from meshwright.cluster.launch import launch
from meshwright.train import rundir
from training_jobs import bits, job, losses, train, write_pairs
from training_store_jobs import train_while_files_break, train_within

COUNT, STEPS = 24, 24
PLANS = {"d2": "plan.depth=2", "n2": "plan.data=2"}
BUDGET_KIB = {"d2": 24, "n2": 48}  # one step fits, but not the 19 training samples beside it: 44 KiB a rank, and more


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = write_pairs(tmp_path_factory.mktemp("pairs"), COUNT)
    return [*settings, f"train.steps={STEPS}", "train.batch=2", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def plain(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that keep all parts in memory."""
    found = {}
    for name, plan in PLANS.items():
        found[name] = tmp_path_factory.mktemp("runs") / name
        train(job(data, plan, ranks=2), found[name])
    return found


def within(
    settings: list[str], name: str, run: Path, *more: str, resume: bool = False, kib: int | None = None
) -> list[dict[str, Any]]:
    """Train within the budget; what each rank says."""
    kib = kib or BUDGET_KIB[name]
    chosen = job(settings, PLANS[name], f"data.memory_mib={kib}", *more, ranks=2)
    rundir.prepare(run, resume=resume)
    found = launch(train_within, 2, (chosen, str(run), resume), threads=1)
    for rank in found:
        assert rank["peak_bytes"] <= kib << 10
        assert (rank["threads"], rank["files"]) == ([], [])
    assert {path.name for path in run.iterdir()} == {
        *("checkpoints", "config.yaml", "layers.json", "machine.json", "plan.yaml", "ranks.json", "reading.json"),
        *("slices.npz", "steps.jsonl", "summary.json", "validation.jsonl"),
    }
    return found


@pytest.mark.parametrize("spill", ["true", "false"])
@pytest.mark.parametrize("name", PLANS)
def test_a_budget_smaller_than_the_data_changes_no_bit(
    name: str, spill: str, data: list[str], plain: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = within(data, name, run, f"data.spill={spill}")
    assert losses(run) == losses(plain[name])
    assert bits(run, STEPS) == bits(plain[name], STEPS)
    used = "spilled" if spill == "true" else "dropped"
    assert all(rank[used] > 0 for rank in found), found
    assert (sum(rank["from_disk"] for rank in found) > 0) == (spill == "true")
    assert (sum(rank["sent_bytes"] for rank in found) > 0) == (name == "n2")
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert all(0 <= line["wait_s"] <= line["data_s"] and line["loaders"] >= 1 for line in lines)
    ranks = json.loads((run / "ranks.json").read_text())
    assert [rank["part_bytes"] for rank in ranks] == [rank["peak_bytes"] for rank in found]
    assert sum(rank["ideal_bytes"] for rank in ranks) == 19 * 13 * 10 * 8 * 5


@pytest.mark.parametrize("name", PLANS)
def test_a_run_goes_on_from_a_checkpoint_with_a_store_or_without(
    name: str, data: list[str], plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("MESHWRIGHT_FAULT", "raise:1:14")
    with pytest.raises(Exception, match="rank 1 of 2 failed: RuntimeError: fault asked for"):
        within(data, name, run)
    monkeypatch.delenv("MESHWRIGHT_FAULT")
    within(data, name, run, resume=True)
    assert losses(run) == losses(plain[name])
    assert bits(run, STEPS) == bits(plain[name], STEPS)


def test_augmentation_that_moves_voxels_between_ranks(data: list[str], tmp_path: Path) -> None:
    more = ["augment.rotate_deg=20", "augment.noise=0.2", "augment.roll=[depth]", "augment.patch=[9, 8, 8]"]
    settings = [*data, *more, "train.steps=12"]
    for name, plan in PLANS.items():
        expected, run = tmp_path / f"{name}_plain", tmp_path / name
        train(job(settings, plan, ranks=2), expected)
        found = within(settings, name, run, kib=96)
        assert sum(rank["sent_bytes"] for rank in found) > 0
        assert losses(run) == losses(expected)
        assert bits(run, 12) == bits(expected, 12)


def test_a_budget_below_one_step_is_refused_by_its_name(data: list[str], tmp_path: Path) -> None:
    chosen = job(data, "data.memory_mib=1")
    run = tmp_path / "run"
    rundir.prepare(run, resume=False)
    with pytest.raises(Exception, match=r"ConfigError: data\.memory_mib = 1: .* too small for rank 0: step 1 alone"):
        launch(train_within, 1, (chosen, str(run)), threads=1)


def stacks(folder: Path, count: int = 12) -> list[str]:
    """Samples whose chunks end where two ranks are cut in depth; the settings of a job on them."""
    folder.mkdir()
    random = np.random.default_rng(1)
    for case in range(count):
        image = random.normal(size=(12, 8, 8)).astype(np.float32)
        group = zarr.open_group(folder / f"{case:02d}.zarr", mode="w")
        group.create_array("image", data=image, chunks=(6, 8, 8))
        group.create_array("label", data=(image > 0.5).astype(np.uint8), chunks=(6, 8, 8))
    return [
        *(f"data.path={folder}", "data.classes=[dark, bright]", "data.intensity=[0, 1]", "data.on_bad=skip"),
        *("model.base=4", "model.levels=2", "train.steps=18", "train.batch=2", "train.validate_every=0", "threads=1"),
    ]


MOVING = ("augment.roll=[depth]", "augment.noise=0.1")


def left_out(run: Path) -> int:
    found: int = json.loads((run / "summary.json").read_text())["left_out"]
    return found


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("d2", (), marks=pytest.mark.full),
        ("n2", ()),
        ("d2", MOVING),
        pytest.param("n2", MOVING, marks=pytest.mark.full),
    ],
)
def test_what_turns_out_bad_while_it_is_read_ahead_is_left_out_by_all(
    name: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    """Two samples that follow each other, and one that only the second half of is damaged; three epochs of 18 steps."""
    settings = [*stacks(tmp_path / "data"), *more]
    for case in ("02", "03", "07"):
        chunk = tmp_path / f"data/{case}.zarr/image/c/{1 if case == '07' else 0}/0/0"
        chunk.write_bytes(chunk.read_bytes()[:-5])
    train(job(settings, PLANS[name], ranks=2), tmp_path / "plain")
    found = within(settings, name, tmp_path / "run", "data.spill=false", kib=64 if more else 32)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert bits(tmp_path / "run", 18) == bits(tmp_path / "plain", 18)
    assert left_out(tmp_path / "run") == left_out(tmp_path / "plain") == 3
    assert all(rank["steps"] > 0 for rank in found)


@pytest.mark.parametrize("name", PLANS)
def test_what_turns_bad_between_two_reads_is_left_out_by_all(name: str, tmp_path: Path) -> None:
    """One rank cannot read a sample again: the ranks go on alike, without it, and none of them waits for another."""
    settings = stacks(tmp_path / "data")
    budget = {"d2": 16, "n2": 32}[name]  # KiB: a step fits, but not the samples of a rank beside it
    chosen = job(settings, PLANS[name], f"data.memory_mib={budget}", "data.spill=false", ranks=2)
    for breaks_at in 1, 2:
        run = tmp_path / f"run{breaks_at}"
        rundir.prepare(run, resume=False)
        zero, one = launch(train_while_files_break, 2, (chosen, str(run), 4, breaks_at), threads=1)
        assert left_out(run) == (one["reads"] >= breaks_at)
        assert len(losses(run)) == 18
        assert one["reads"] >= breaks_at or name == "n2"  # under d2 each rank reads a part of each sample
    assert (zero["threads"], zero["files"], one["threads"], one["files"]) == ([], [], [], [])


def test_samples_of_another_size_are_left_out_of_batches_of_several(tmp_path: Path) -> None:
    settings = stacks(tmp_path / "data")
    group = zarr.open_group(tmp_path / "data/05.zarr", mode="w")
    for name in ("image", "label"):
        group.create_array(name, data=np.arange(6 * 8 * 8).reshape(6, 8, 8) % 2)
    train(job(settings, "train.steps=7"), tmp_path / "a")
    train(job(settings, "train.steps=7", "data.memory_mib=1"), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert left_out(tmp_path / "a") == left_out(tmp_path / "b") == 1
    train(job(settings, "train.steps=2", "train.batch=1"), tmp_path / "c")
    assert left_out(tmp_path / "c") == 0
    for more in (), ("data.memory_mib=1",):
        with pytest.raises(Exception, match=r"05.zarr has|has shape \(12, 8, 8\) but .*05.zarr.* \(6, 8, 8\)"):
            train(job(settings, "data.on_bad=stop", *more), tmp_path / f"stop{len(more)}")
