"""A training command that is killed, stopped or starved ends in time with one message, and resumes to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from meshwright.cli import main
from meshwright.cluster.launch import launch
from meshwright.errors import RankError
from training_jobs import STEPS, bits, job, last, losses, run_with_little_space, train, write_pairs

END_S = 30.0  # for processes to be gone, on a machine that is busy with other tests


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits that every disturbed run must reach in the end."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(job(data, ranks=2), run)
    return bits(run)


def words(data: list[str], run: Path, *more: str) -> list[str]:
    """The arguments of `meshwright` for the small job."""
    return ["train", "--ranks", "2", "--run", str(run), *(w for setting in (*data, *more) for w in ("--set", setting))]


@contextmanager
def halted(arguments: list[str], step: int) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """`meshwright` in a session of its own and all processes below it, once rank 1 stands still before `step`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "MESHWRIGHT_FAULT": f"stop:1:{step}"},
    )
    assert process.stdout is not None
    below: list[psutil.Process] = []
    try:
        if not any(f"step {step - 1}/" in line for line in process.stdout):
            pytest.fail(f"the command ended before step {step}: {process.communicate()[1]}")
        below = psutil.Process(process.pid).children(recursive=True)
        while not stopped(below):
            os.sched_yield()
        yield process, below
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == []  # no orphan
    finally:
        for other in (process, *below):
            with suppress(psutil.NoSuchProcess):
                other.kill()
        process.communicate()


def stopped(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.status() == psutil.STATUS_STOPPED]


def assert_resumes_to(expected: str, run: Path, capfd: pytest.CaptureFixture[str], *more: str) -> None:
    """The name of the run is all that `--resume` needs; settings that change no number are not told."""
    assert main(["train", "--resume", str(run), *(word for setting in more for word in ("--set", setting))]) == 0
    output = capfd.readouterr().out
    assert "going on from step_" in output
    assert "other settings" not in output
    assert f"report: {run}" in output
    assert len(losses(run)) == STEPS
    assert bits(run) == expected


def test_kill_9_of_the_whole_job_resumes_to_the_same_bits(
    data: list[str], undisturbed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with halted(words(data, run), step=4) as (process, _):
        os.killpg(process.pid, signal.SIGKILL)
    assert last(run).step == 2
    assert_resumes_to(undisturbed, run, capfd)


@pytest.mark.parametrize(("before", "after"), [("null", "1"), ("1", "null")])
def test_kill_9_of_one_rank_ends_the_job_and_resumes_to_the_same_bits(
    before: str,
    after: str,
    data: list[str],
    undisturbed: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("MESHWRIGHT_FAULT", "kill:1:4")
    assert main(words(data, run, f"data.memory_mib={before}")) == 1
    errors = capfd.readouterr().err
    assert "meshwright: error: rank 1 of 2 was killed by SIGKILL" in errors
    assert "cli.py" not in errors
    assert last(run).step == 2
    monkeypatch.delenv("MESHWRIGHT_FAULT")
    assert_resumes_to(undisturbed, run, capfd, f"data.memory_mib={after}")


@pytest.mark.parametrize("more", [(), ("data.memory_mib=1", "plan.data=2", "train.batch=2")])
def test_a_rank_that_raises_shows_its_own_traceback_and_then_one_line(
    more: tuple[str, ...],
    data: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "raise:0:1")
    assert main(words(data, tmp_path / "run", *more)) == 1
    traceback, _, line = capfd.readouterr().err.partition("meshwright: error: ")
    assert "RuntimeError: fault asked for" in traceback
    assert "cli.py" not in traceback
    assert line.startswith("rank 0 of 2 failed: RuntimeError: fault asked for")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [(signal.SIGTERM, 143, ()), (signal.SIGTERM, 143, ("data.memory_mib=1",)), (signal.SIGINT, 130, ())],
)
def test_a_signal_lets_the_step_end_and_writes_a_checkpoint(
    number: signal.Signals,
    code: int,
    more: tuple[str, ...],
    data: list[str],
    undisturbed: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with halted(words(data, run, "checkpoint.every=0", *more), step=3) as (process, below):
        assert process.stderr is not None
        os.kill(process.pid, number)
        assert any("stopping after this step" in line for line in process.stderr)
        for rank in stopped(below):
            rank.resume()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert f"stopped by signal {int(number)} after step 3" in errors
    assert "Traceback" not in errors
    assert last(run).step == 3
    assert not (run / "summary.json").exists()
    if number == signal.SIGTERM:
        assert_resumes_to(undisturbed, run, capfd)


def test_a_loss_that_is_no_number_stops_the_run_with_one_message(
    data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["optim.lr=1.0e+30", "optim.schedule=constant", "train.precision=fp32"]
    assert main(words(data, tmp_path / "run", *settings)) == 1
    errors = capfd.readouterr().err
    assert "NumericsError: step" in errors
    assert "Traceback" not in errors
    assert errors.count("meshwright: error: ") == 1


def test_a_full_disk_keeps_the_checkpoint_before(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(job(data, "train.steps=2"), run)
    with pytest.raises(RankError, match="CheckpointError: cannot write checkpoint step_00000004") as caught:
        launch(run_with_little_space, 1, (job(data, "train.steps=4"), str(run)), threads=1)
    assert "step_00000002, stays" in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(
    data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(job(data, "train.steps=2"), run)
    assert main(["train", "--resume", str(run), "--set", "model.base=5"]) == 1
    errors = capfd.readouterr().err
    assert "belongs to another model" in errors
    assert "down.0.0.weight (saved float32 (4, 1, 3, 3, 3), this model float32 (5, 1, 3, 3, 3))" in errors
    weights = run / "checkpoints/step_00000002/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert main(["train", "--resume", str(run)]) == 1
    errors = capfd.readouterr().err
    assert "model.safetensors is damaged" in errors
    assert "Traceback" not in errors
