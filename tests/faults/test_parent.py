"""Ctrl-C, SIGTERM or SIGKILL of the caller: its ranks and helpers end too, within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

END_S = 10.0
SCRIPT = Path(__file__).with_name("fault_jobs.py")


def heed_ctrl_c() -> None:
    """Tests that a shell has put in the background ignore SIGINT, and what they start would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(job: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The script with two ranks at work, in a session of its own, and every process below it."""
    command = [sys.executable, str(SCRIPT), job]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    below: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        ready = [process.stdout.readline() for _ in range(2)]
        below = psutil.Process(process.pid).children(recursive=True)
        assert {int(line.split()[1]) for line in ready} <= {other.pid for other in below}
        yield process, below
    finally:
        process.kill()
        for other in below:
            with suppress(psutil.NoSuchProcess):
                other.kill()
        process.communicate()


# each case imports torch twice, so not every combination
@pytest.mark.parametrize(("job", "to_all"), [("exchange", True), ("sleep", False)], ids=["terminal", "parent only"])
def test_ctrl_c(job: str, to_all: bool) -> None:
    with running(job) as (process, below):
        begin_s = time.monotonic()
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=END_S)
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == []
        assert time.monotonic() - begin_s < END_S
        assert process.returncode != 0
        assert errors.count("KeyboardInterrupt") == 1, errors


@pytest.mark.parametrize(("job", "number"), [("exchange", signal.SIGKILL), ("sleep", signal.SIGTERM)])
def test_the_parent_is_killed(job: str, number: signal.Signals) -> None:
    with running(job) as (process, below):
        process.send_signal(number)
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == []
        process.communicate(timeout=END_S)
        assert process.returncode == -number
