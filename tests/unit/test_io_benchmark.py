"""benchmarks/io.py: what it can do, and that readers read what they promise, by a small run of `formats`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "io.py"
EXACT = ("npy", "nii", "HDF5 contiguous", "Zarr, chunks at the cuts", "Zarr, shards at the cuts")
NEAR = ("HDF5, chunks at the cuts", "HDF5 gzip, chunks at the cuts", "Zarr zstd, chunks at the cuts")
UNEVEN = ("HDF5, chunks at the cuts, uneven", "Zarr, chunks at the cuts, uneven")


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_help_names_the_claims() -> None:
    said = run("--help")
    for claim in ("resident", "rereading", "layouts", "memory", "formats", "loaders", "workers"):
        assert f"python benchmarks/io.py {claim}" in said
    for option in ("--edge", "--rounds", "--claims"):
        assert option in said


def test_bytes_read_are_the_bytes_asked_for(tmp_path: Path) -> None:
    said = run("--claims", "formats", "--edge", "24", "--json", str(tmp_path / "figures.json"))
    assert "MORE THAN ASKED" not in said
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    for plan in ("d2", "h2", "d2h2"):
        counted = {kind: figures[f"formats {plan}, {kind}: counted"] for kind in (*EXACT, *NEAR, *UNEVEN)}
        assert [counted[kind] for kind in (*EXACT, *NEAR)] == [1.0] * 8
        cuts = len(plan) // 2  # one more position than two equal parts, along each dim that is cut
        assert [counted[kind] for kind in UNEVEN] == pytest.approx([(26 / 25) ** cuts] * 2)
        stream = figures[f"formats {plan}, nii.gz, decoded once a host: counted"]
        assert stream == pytest.approx(1.0, abs=0.02)  # once, with its header of 352 bytes
        assert figures[f"formats {plan}, nii.gz, decoded once a host: shared"] == 1.0
