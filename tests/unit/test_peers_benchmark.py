"""benchmarks/peers.py where no peer is installed: it says so, and what it would call right or wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import peers

        return peers
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_names_the_peers() -> None:
    said = run("--help")
    assert "--distconv PATH" in said
    assert "--shardtensor PYTHON" in said


def test_what_is_absent_is_skipped_with_a_message(peers: ModuleType, tmp_path: Path) -> None:
    said = run("--rounds", "0", "--distconv", str(tmp_path), "--shardtensor", sys.executable)
    assert f"distconv: skipped: {tmp_path} is no checkout of DistConv" in said
    assert f"shardtensor: skipped: {sys.executable} is no Python with nvidia-physicsnemo" in said
    not_given = peers.absent(Namespace(distconv=None, shardtensor=None))
    assert "--distconv PATH" in not_given["distconv"]
    assert "--shardtensor PYTHON" in not_given["shardtensor"]


def test_a_wrong_answer_is_called_wrong(peers: ModuleType) -> None:
    noise = {"loss": 1e-6, "gradients": 1e-3}
    right = {"fp64": 1e-14, "loss": 1e-6, "gradients": 2e-3}
    assert peers.verdict(right, noise) == "right"
    assert peers.verdict({"fp64": 1e-14, "loss": 6e-8, "gradients": 8e-7}, {"loss": 0.0, "gradients": 0.0}) == "right"
    assert peers.verdict(right | {"fp64": 3e-8}, noise) == "right to fp32"
    for off in ({"fp64": 1e-5}, {"gradients": 0.1}, {"loss": 0.1}, {"loss": math.nan}, {"fp64": math.nan}):
        assert peers.verdict(right | off, noise) == "WRONG"


def test_a_contender_that_cannot_run_says_why(peers: ModuleType, tmp_path: Path) -> None:
    pair = peers.Pair("nobody", sys.executable, 8, "fp32", tmp_path, "")
    try:
        with pytest.raises(peers.PeerError, match="no contender 'nobody'"):
            pair.ask()
        assert all(process.poll() is not None for process in pair.ranks)
    finally:
        pair.stop()
