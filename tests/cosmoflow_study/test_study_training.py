"""Training under any plan is training on one rank; a killed one that goes on is one that was never killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ranks
import worlds

import meshwright as mw
from cosmostudy import training
from cosmostudy.training import Training
from meshwright.errors import RankError

PLANS = {
    "depth 2": mw.Plan.uniform(depth=2),
    "data 2 height 2": mw.Plan.uniform(data=2, height=2),
    "width 3": mw.Plan.uniform(width=3),
}


def study_of(plan: mw.Plan, folder: Path, *more: str) -> worlds.Study:
    path = folder / "plan.yaml"
    plan.save(path)
    return worlds.small(f"split.others={path}", f"split.largest={path}", "train.batch=2", *more)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_any_plan_trains_as_one_rank_does(universes: Path, tmp_path: Path, name: str, batch_norm: bool) -> None:
    if not batch_norm and name != "depth 2":
        return
    one = Training(16, 0, batch_norm)
    results = []
    for plan in (mw.Plan.uniform(), PLANS[name]):
        study = study_of(plan, tmp_path, "train.precision=fp64", "train.batch=1")
        found = mw.launch(ranks.trained, plan.ranks, (study, one, str(universes), str(tmp_path / "run"), 3), threads=1)
        results.append(found[0])
    whole, split = results
    assert split["losses"] == pytest.approx(whole["losses"], rel=1e-9)
    assert len(set(whole["losses"])) == 3
    for key, value in whole["weights"].items():
        assert np.abs(split["weights"][key] - value).max() <= 1e-8 * max(1e-3, np.abs(value).max()), key
    assert split["predictions"] == pytest.approx(whole["predictions"], abs=1e-8)
    assert split["predictions"].shape == (worlds.TEST, 8, 4)


def test_the_store_serves_the_same_batches(universes: Path, tmp_path: Path) -> None:
    study = study_of(mw.Plan.uniform(data=2), tmp_path, "data.store_mib=64")
    arguments = (Training(16, 2), str(universes), str(tmp_path / "run"), 4)
    kept = mw.launch(ranks.served, 2, (ranks.without_store(study), *arguments), threads=1)
    stored = mw.launch(ranks.served, 2, (study, *arguments), threads=1)
    for mine, other in zip(kept, stored, strict=True):
        assert len(mine) == 8
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_killed_training_goes_on_to_the_same_bits(
    universes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(mw.Plan.uniform(depth=2), tmp_path, "train.batch=1", "train.checkpoint_every=3")
    one = Training(32, 1)
    assert study.steps(32) == 8

    def run(folder: str) -> int:
        return max(mw.launch(training.run, 2, (study, one, str(universes), ranks.SCALE, folder), threads=1))

    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    assert run(straight) == 0
    monkeypatch.setenv("MESHWRIGHT_FAULT", "kill:1:6")
    with pytest.raises(RankError):
        run(killed)
    assert not (tmp_path / "killed" / training.RESULT).exists()
    assert [path.name for path in (tmp_path / "killed" / training.CHECKPOINTS).iterdir()] == ["step_00000003"]
    monkeypatch.delenv("MESHWRIGHT_FAULT")
    assert run(killed) == 0
    for name in (training.PREDICTIONS,):
        with np.load(tmp_path / "straight" / name) as a, np.load(tmp_path / "killed" / name) as b:
            assert all(np.array_equal(a[key], b[key]) for key in a.files)
    losses = [
        [record["loss"] for record in training.rundir.records(Path(at) / training.STEPS)] for at in (straight, killed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
