"""What one rank alone cannot read ends the job in seconds, long before the time limit, with that rank's own message."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from meshwright.cli import main

LIMIT_S, END_S = 900.0, 120.0  # of an exchange; of the whole job, on a machine that is busy with other tests
SCRIPT = "import sys\nfrom meshwright.cli import main\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
WAYS = [("plan.depth=2", "null"), ("plan.depth=2", "1"), ("plan.data=2", "null"), ("plan.data=2", "1")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve samples in chunks that end where two ranks are cut in depth; a chunk of the second half is damaged."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(1)
    for case in range(12):
        image = random.normal(size=(12, 8, 8)).astype(np.float32)
        group = zarr.open_group(folder / f"{case:02d}.zarr", mode="w")
        group.create_array("image", data=image, chunks=(6, 8, 8))
        group.create_array("label", data=(image > 0.5).astype(np.uint8), chunks=(6, 8, 8))
    chunk = folder / "07.zarr/image/c/1/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    settings = [
        *(f"data.path={folder}", "data.classes=[dark, bright]", "data.intensity=[0, 1]", "train.steps=18"),
        *("train.batch=2", "train.validate_every=0", "model.base=4", "model.levels=2", "threads=1"),
    ]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize(("plan", "memory"), WAYS)
def test_local_ranks(
    plan: str,
    memory: str,
    data: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MESHWRIGHT_TIMEOUT_S", str(LIMIT_S))
    begin_s = time.monotonic()
    words = ["train", "--ranks", "2", "--run", str(tmp_path / "run"), *data, "--set", plan]
    assert main([*words, "--set", f"data.memory_mib={memory}"]) == 1
    assert time.monotonic() - begin_s < END_S
    errors = capfd.readouterr().err
    rank = "1" if plan == "plan.depth=2" else "[01]"  # under data the order decides which one reads the sample
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    with pytest.raises(
        ValueError, match=rf"error: rank {rank} of 2 failed: DataError: .*07.zarr/image: truncated or dama"
    ):
        raise ValueError(line)
    assert "Traceback" not in errors


@pytest.mark.parametrize(("plan", "memory"), WAYS[1:3])
def test_under_torchrun(plan: str, memory: str, data: list[str], tmp_path: Path) -> None:
    """Nobody but the failing rank itself tells the others: its end closes their connections."""
    (tmp_path / "entry.py").write_text(SCRIPT)
    start = [*("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")]
    start += [*("--rdzv-endpoint", "localhost:0", "--", str(tmp_path / "entry.py"), "train", *data, "--set", plan)]
    start += ["--set", f"data.memory_mib={memory}", "--set", f"run={tmp_path / 'run'}"]
    limits = {**os.environ, "MESHWRIGHT_TIMEOUT_S": str(LIMIT_S)}
    done = subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, timeout=END_S, check=False, env=limits
    )
    assert done.returncode != 0
    assert "07.zarr/image: truncated or damaged" in done.stderr
