"""The scaling curves: which plans they compare, what is measured of each, and that they can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import worlds

import meshwright as mw
from cosmostudy import scaling, scaling_figure
from cosmostudy.scaling import Point


def test_strong_keeps_the_batch_and_weak_the_work_of_a_rank() -> None:
    found = scaling.points(4)
    curves = {curve: [point for point in found if point.curve == curve] for curve in ("strong", "weak", "weak, pairs")}
    assert sum(map(len, curves.values())) == len(found)
    assert {point.batch for point in curves["strong"]} == {4}
    for curve in ("weak", "weak, pairs"):
        assert {point.batch / point.plan.ranks for point in curves[curve]} == {2}
    assert [point.plan.ranks for point in curves["strong"]] == [1, 2, 4, 8]


def test_a_split_step_sends_windows_and_takes_less_memory_than_the_whole(
    universes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = [Point("strong", mw.Plan.uniform(), 2), Point("strong", mw.Plan.uniform(depth=2), 2)]
    monkeypatch.setattr(scaling, "points", lambda batch: compared)
    monkeypatch.setattr(scaling, "STEPS", 2)
    study = worlds.small("train.batch=2", "network.width=8")
    rows = scaling.measure(study, str(universes), ranks.SCALE, tmp_path)
    assert rows == json.loads((tmp_path / scaling.FILE).read_text(encoding="utf-8"))
    whole, split = rows
    assert whole["sent_bytes"] == 0
    assert split["sent_bytes"] > split["reduced_bytes"] > 0
    assert all(row["step_s"] >= row["compute_s"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "strong: depth=2, 2 cubes" in said
    scaling_figure.draw(tmp_path / "scaling.png", rows, 32)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_not_timed_is_not_drawn_as_if(tmp_path: Path) -> None:
    row = {"curve": "strong", "plan": "depth=8", "ranks": 8, "batch": 4, "timed": False, "step_bytes": 1 << 20}
    row |= {"sent_bytes": 1 << 20, "step_s": 9.0}
    assert "not timed" in scaling.line(row)
    scaling_figure.draw(tmp_path / "scaling.png", [row], 64)
