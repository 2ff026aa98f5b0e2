"""A training command that is killed, stopped or starved ends in time with one message, and resumes to the same bits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from training_jobs import STEPS, bits, last, losses, write_pairs

END_S = 30.0  # on a machine that is busy with other tests; torch alone takes seconds to be imported


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits that every disturbed run must reach in the end."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = finished(start(["--ranks", "2", "--run", str(run)], data))
    assert done.returncode == 0, done.stderr
    assert f"report: {run}" in done.stdout
    return bits(run)


def start(
    arguments: list[str], settings: list[str], limit: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """`meshwright train` in a session of its own, with pipes for its output."""
    words = [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "meshwright", "train", *arguments, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[psutil.Process]:
    """Read the output up to the line with `text`; returns every process below the command."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return psutil.Process(process.pid).children(recursive=True)
    pytest.fail(f"the command ended before {text!r}: {process.communicate()[1]}")


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def assert_gone(below: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(below, timeout=END_S)
    assert alive == []


def resume(run: Path) -> str:
    """Resume with nothing but the name of the run; the bits it ends with."""
    done = finished(start(["--resume", str(run)], []))
    assert done.returncode == 0, done.stderr
    assert "going on from step_" in done.stdout
    assert len(losses(run)) == STEPS
    return bits(run)


def test_kill_9_of_the_whole_job_resumes_to_the_same_bits(data: list[str], undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(["--ranks", "2", "--run", str(run)], data)
    below = wait_for(process, "step 3/")
    os.kill(process.pid, signal.SIGKILL)
    assert_gone(below)  # no orphan
    process.communicate()
    assert resume(run) == undisturbed


def test_kill_9_of_one_rank_ends_the_job_and_resumes_to_the_same_bits(
    data: list[str], undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = finished(start(["--ranks", "2", "--run", str(run)], data, MESHWRIGHT_FAULT="kill:1:4"))
    assert done.returncode == 1
    assert "meshwright: error: rank 1 of 2 was killed by SIGKILL" in done.stderr
    assert "cli.py" not in done.stderr
    assert last(run).step == 2
    assert resume(run) == undisturbed


def test_a_rank_that_raises_shows_its_own_traceback_and_then_one_line(data: list[str], tmp_path: Path) -> None:
    done = finished(start(["--ranks", "2", "--run", str(tmp_path / "run")], data, MESHWRIGHT_FAULT="raise:0:1"))
    assert done.returncode == 1
    traceback, _, line = done.stderr.partition("meshwright: error: ")
    assert "RuntimeError: fault asked for" in traceback
    assert "cli.py" not in traceback
    assert line.startswith("rank 0 of 2 failed: RuntimeError: fault asked for")
    assert line.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_writes_a_checkpoint(
    number: signal.Signals, code: int, data: list[str], undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(["--ranks", "2", "--run", str(run)], [*data, "checkpoint.every=0"])
    below = wait_for(process, "step 1/")
    os.kill(process.pid, number)
    done = finished(process)
    assert done.returncode == code
    assert f"stopped by signal {int(number)} after step" in done.stderr
    assert "Traceback" not in done.stderr
    assert_gone(below)
    assert 1 <= last(run).step < STEPS
    assert not (run / "summary.json").exists()
    assert resume(run) == undisturbed


def test_a_loss_that_is_no_number_stops_the_run_with_one_message(data: list[str], tmp_path: Path) -> None:
    settings = [*data, "optim.lr=1.0e+30", "optim.schedule=constant", "train.precision=fp32"]
    done = finished(start(["--ranks", "2", "--run", str(tmp_path / "run")], settings))
    assert done.returncode == 1
    assert "NumericsError: step" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("meshwright: error: ") == 1


def test_a_full_disk_keeps_the_checkpoint_before(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = finished(start(["--ranks", "1", "--steps", "2", "--run", str(run)], data))
    assert done.returncode == 0, done.stderr
    largest_bytes = max(path.stat().st_size for path in (run / "checkpoints/step_00000002").iterdir())

    def little_space() -> None:
        """The kernel refuses files of a checkpoint's size, as a full disk does."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes // 2, largest_bytes // 2))

    done = finished(start(["--resume", str(run), "--steps", "4"], [], limit=little_space))
    assert done.returncode == 1
    assert "CheckpointError: cannot write checkpoint step_00000004" in done.stderr
    assert "step_00000002, stays" in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finished(start(["--ranks", "1", "--steps", "2", "--run", str(run)], data)).returncode == 0
    done = finished(start(["--resume", str(run)], ["model.base=5"]))
    assert done.returncode == 1
    assert "belongs to another model" in done.stderr
    assert "down.0.0.weight (saved float32 (4, 1, 3, 3, 3), this model float32 (5, 1, 3, 3, 3))" in done.stderr
    weights = run / "checkpoints/step_00000002/model.safetensors"
    data_bytes = bytearray(weights.read_bytes())
    data_bytes[-1] ^= 1
    weights.write_bytes(data_bytes)
    done = finished(start(["--resume", str(run)], []))
    assert done.returncode == 1
    assert "model.safetensors is damaged" in done.stderr
    assert "Traceback" not in done.stderr
