"""`data.memory_mib`: training through the store gives the bits of training without it, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.cluster.launch import launch
from meshwright.errors import ConfigError
from meshwright.train import job as jobs
from meshwright.train import rundir
from training_jobs import bits, job, losses, train, write_pairs
from training_store_jobs import train_within

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


def test_samples_cannot_be_left_out_of_what_is_read_ahead(data: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.memory_mib = 5 and data\.on_bad = skip do not go together"):
        jobs.sources(job(data, "data.memory_mib=5", "data.on_bad=skip"))
