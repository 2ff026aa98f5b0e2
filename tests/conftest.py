"""For every test: one thread per process, and the seconds of each folder at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

# Many ranks share a few cores; child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_seconds: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    room = Path(report.nodeid.split("::")[0]).parent
    _seconds[str(room)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for room, seconds in sorted(_seconds.items()):
        terminalreporter.write_line(f"{room}: {seconds:.0f} s")
