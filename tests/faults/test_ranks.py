"""A rank that raises, dies or falls silent ends the job in time with one error that names it, and leaves nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import fault_jobs
import psutil
import pytest

from meshwright.cluster.launch import launch
from meshwright.errors import ConfigError, RankError
from meshwright.guard.inject import Fault

END_S = 10.0
SILENCE_S = 2.0


def ranks_alive() -> list[psutil.Process]:
    """Grandchildren are ranks; the direct children (fork server, resource tracker) serve the whole process."""
    return [child for child in psutil.Process().children(recursive=True) if child.ppid() != os.getpid()]


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The first launch of a process imports torch in the fork server; the time limits are about faults."""
    assert launch(fault_jobs.steps, 2) == [30.0] * 2  # x → 2 (x + 1), four times from 0


@pytest.fixture(autouse=True)
def nobody_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MESHWRIGHT_FAULT", raising=False)
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < END_S
    assert ranks_alive() == []


def failure(job: Callable[[], object], ranks: int = 3, timeout_s: float = 60.0) -> RankError:
    with pytest.raises(RankError) as caught:
        launch(job, ranks, timeout_s=timeout_s)
    return caught.value


def test_a_rank_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "raise:1:2")
    error = failure(fault_jobs.steps)
    text = str(error)
    assert error.rank == 1
    assert text.startswith("rank 1 of 3 failed: RuntimeError: fault asked for")
    assert text.index("fault_point(step)") < text.index("Meanwhile")
    assert "fault_jobs.py" in error.cause
    assert text.count("Traceback") == 1


def test_the_first_of_two_failures_is_named() -> None:
    error = failure(fault_jobs.raise_at_two_ranks)
    assert error.rank == 2
    assert "the first" in str(error).splitlines()[0]


def test_a_rank_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "kill:1:2")
    error = failure(fault_jobs.steps)
    assert error.rank == 1
    assert str(error).startswith("rank 1 of 3 was killed by SIGKILL")


def test_a_rank_that_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "exit:2:1")
    error = failure(fault_jobs.steps)
    assert error.rank == 2
    assert str(error).startswith("rank 2 of 3 ended with exit code 0 without returning")


def test_a_rank_that_calls_sys_exit() -> None:
    error = failure(fault_jobs.exit_politely)
    assert error.rank == 0
    assert "sys.exit(0) before the function returned" in str(error)


def test_an_error_raised_from_a_broken_connection_does_not_hide_the_dead_rank() -> None:
    error = failure(fault_jobs.wrap_network_error, ranks=2)
    assert error.rank == 1
    assert "exit code 7" in str(error)


def test_a_stopped_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "stop:1:2")
    error = failure(fault_jobs.steps, timeout_s=SILENCE_S)
    text = str(error)
    assert error.rank == 1
    assert text.startswith("rank 1 of 3 did not answer within the 2 s of an exchange: it is stopped (SIGSTOP)")
    for rank in (0, 2):
        assert f"rank {rank}: waited for another rank at" in text
    assert "dist.all_reduce" in text


def test_a_sleeping_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "hang:0:1")
    error = failure(fault_jobs.steps, ranks=2, timeout_s=SILENCE_S)
    assert error.rank == 0
    assert "did not answer within the 2 s" in str(error)
    assert "inject.py" in error.cause, "it says where the silent rank was"


def test_a_sleeping_rank_in_a_group_made_later() -> None:
    error = failure(fault_jobs.hang_in_subgroup, ranks=2, timeout_s=SILENCE_S)
    assert error.rank == 1
    assert "time.sleep" in error.cause


def test_a_rank_that_returned_while_another_waits() -> None:
    error = failure(fault_jobs.return_early, ranks=2, timeout_s=SILENCE_S)
    assert error.rank == 0
    assert "Timed out" in str(error)
    assert "rank 1: had returned" in str(error)


def test_a_failure_leaves_the_caller_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_FAULT", "kill:0:0")
    failure(fault_jobs.steps, ranks=2)
    monkeypatch.delenv("MESHWRIGHT_FAULT")
    assert len(launch(fault_jobs.steps, 2)) == 2


@pytest.mark.parametrize("text", ["", "kill", "kill:1", "melt:0:0", "kill:-1:0", "kill:0:x"])
def test_a_fault_that_is_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="kind:rank:step"):
        Fault.parse(text)
