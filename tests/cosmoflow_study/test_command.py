"""The command from universes to the report, small: what it writes, what it does not repeat, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import worlds

from cosmostudy import command

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cosmoflow"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = [word for setting in worlds.SMALL for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-m", "cosmostudy.command", *settings, *arguments],
        env=worlds.environment(PYTHONPATH=str(EXAMPLE)),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_from_universes_to_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("--out", str(out), "--set", "seeds=[0]")
    assert first.returncode == command.BROKEN, first.stderr  # so few steps teach nothing, and it is said
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text in first.stdout
    for word in ("| 16³ | 1 |", "| 16³, no batch norm | 1 |", "| 32³ | depth=2 | 8 × 1 |", "BROKEN  σ_8", "cores of"):
        assert word in text, word
    assert "laws do not hold; nothing above is hidden" in first.stderr
    assert "needs about" in first.stdout
    found = json.loads((out / "errors.json").read_text(encoding="utf-8"))
    assert [row["cubes"] for row in found["rows"]] == [
        "16³, no batch norm", "16³", "32³", "16³, linear fit", "32³, linear fit"
    ]  # fmt: skip
    assert [law["holds"] for law in found["laws"]].count(False) >= 1
    for name in ("errors.png", "scatter.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    before = worlds.files(out / "trainings")
    again = run("--out", str(out), "--set", "seeds=[0]")
    assert again.returncode == command.BROKEN
    assert "needs about" not in again.stdout  # nothing was trained again
    assert worlds.files(out / "trainings") == before

    other = run("--out", str(out), "--set", "seeds=[1]")
    assert other.returncode == 1
    assert "is another study" in other.stderr


def test_help_teaches() -> None:
    done = subprocess.run([EXAMPLE / "run", "--help"], capture_output=True, text=True, timeout=120, check=True)
    for word in ("--quick", "--set", "--report", "train.recipe=original", "plans/2048.yaml", "exit code"):
        assert word in done.stdout


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--set", "train.epoch=1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert command.main(["--report", "--out", str(tmp_path)]) == 1
    assert "no training in" in capsys.readouterr().err
