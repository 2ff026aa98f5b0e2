"""`launch`: results in rank order, the promised surroundings, and refusals before anything starts."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import launch_jobs
import pytest
import torch
import torch.distributed as dist

from meshwright.cluster.launch import launch
from meshwright.cluster.process_group import ensure_process_group, leave
from meshwright.errors import ConfigError, PlanError, RankError

SCRIPT = Path(launch_jobs.__file__)
GUARD = 'if __name__ == "__main__":'


def run_script(path: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *extra, str(path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize("ranks", [1, 3])
def test_results_come_in_rank_order_and_tensors_survive_their_rank(ranks: int) -> None:
    tensor = torch.arange(300_000, dtype=torch.float64)
    answers = launch(launch_jobs.scale_and_sum, ranks, (tensor, 2.0))
    assert [answer.rank for answer in answers] == list(range(ranks))
    for answer in answers:
        torch.testing.assert_close(answer.tensor, tensor * (ranks * (ranks + 1)))


def test_spawned_ranks_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("meshwright.cluster.launch")
    monkeypatch.setattr(module, "_context", lambda: multiprocessing.get_context("spawn"))
    answers = launch(launch_jobs.scale_and_sum, 2, (torch.ones(2), 1.0))
    assert [answer.tensor.tolist() for answer in answers] == [[3.0, 3.0]] * 2


def test_the_surroundings_exist_before_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "set after the first launch")
    for rank, found in enumerate(launch(launch_jobs.surroundings, 2)):
        assert found == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "MARK": "set after the first launch",
            "backend": "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= 2 else "gloo",
            "launcher": "meshwright",
        }


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(launch_jobs.threads, 2, threads=3) == [3, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert launch(launch_jobs.threads, 1) == [2]
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert launch(launch_jobs.threads, 2) == [max(1, cores // 2)] * 2


def test_env_rendezvous_works_in_a_rank() -> None:
    assert launch(launch_jobs.meet_again_by_environment, 2) == [2, 2]


def test_launch_inside_a_rank_runs_in_place() -> None:
    assert launch(launch_jobs.launch_inside, 2) == [[0], [1]]


def test_global_random_streams_differ_between_ranks() -> None:
    (first, numpy_first), (second, numpy_second) = launch(launch_jobs.draw, 2)
    assert first != second
    assert numpy_first != numpy_second


def test_output_and_directory_are_the_callers(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch(launch_jobs.working_directory, 1) == [str(tmp_path)]
    launch(launch_jobs.say, 2, ("hello",))
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["hello from rank 0", "hello from rank 1"]
    assert err.splitlines() == ["hello as error"] * 2


def test_a_script_ends_without_a_warning() -> None:
    done = run_script(SCRIPT)
    assert (done.stdout, done.stderr, done.returncode) == ("[1, 1]\n", "", 0)


def test_a_script_without_the_main_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT.read_text(encoding="utf-8").replace(GUARD, "if True:"), encoding="utf-8")
    done = run_script(script)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-4:]
    assert any("before its function was called" in line and "__main__" in line for line in last), done.stderr


def test_a_typed_in_function_is_refused() -> None:
    code = "from meshwright.cluster.launch import launch\ndef f(): pass\nlaunch(f, 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "PlanError" in done.stderr.splitlines()[-1]
    assert "save it first" in done.stderr


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("a process was about to start")

    monkeypatch.setattr(importlib.import_module("meshwright.cluster.launch"), "_context", fail)


@pytest.mark.usefixtures("nothing_starts")
class TestRefusals:
    def test_a_lambda(self) -> None:
        with pytest.raises(PlanError, match=r"launch\(.*lambda.*top level"):
            launch(lambda: None, 2)

    def test_an_argument_that_cannot_be_sent(self) -> None:
        with pytest.raises(PlanError, match="sendable"):
            launch(launch_jobs.say, 2, (lambda: None,))

    @pytest.mark.parametrize("ranks", [0, -1, 2.0, True, "2"])
    def test_ranks(self, ranks: int) -> None:
        with pytest.raises(PlanError, match="whole number"):
            launch(launch_jobs.threads, ranks)

    @pytest.mark.parametrize("limit_s", [0.0, -1.0, float("nan"), float("inf")])
    def test_time_limit(self, limit_s: float) -> None:
        with pytest.raises(ConfigError, match="positive, finite"):
            launch(launch_jobs.threads, 2, timeout_s=limit_s)

    def test_time_limit_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MESHWRIGHT_TIMEOUT_S", "soon")
        with pytest.raises(ConfigError, match="MESHWRIGHT_TIMEOUT_S='soon'"):
            launch(launch_jobs.threads, 2)


def test_a_result_that_cannot_be_sent() -> None:
    with pytest.raises(RankError, match="a function, cannot be sent to the caller"):
        launch(launch_jobs.unsendable, 2)


def test_one_process_needs_no_launcher_but_more_do() -> None:
    leave()  # another test of this process may have joined a group of one
    with pytest.raises(PlanError, match="needs 2 ranks, but this is a single process; start as many"):
        ensure_process_group(2)
    ensure_process_group(1)
    try:
        assert dist.get_world_size() == 1
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
        ensure_process_group(1)
        with pytest.raises(PlanError, match="needs 4 ranks, but the process group has 1"):
            ensure_process_group(4)
        assert launch(launch_jobs.threads, 2, threads=1) == [1, 1], "a group of one does not stop a launch"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("style", ["torchrun", "slurm"])
def test_under_a_job_launcher_the_function_runs_here(style: str, free_port: int) -> None:
    code = (
        "import torch.distributed as dist, launch_jobs; from meshwright.cluster.launch import launch;"
        "print(launch(launch_jobs.meet, 2), dist.get_rank())"
    )
    ranks = [_job_rank(style, rank, free_port, code) for rank in range(2)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert outputs == [("[3.0] 0\n", ""), ("[3.0] 1\n", "")]


def _job_rank(style: str, rank: int, port: int, code: str) -> subprocess.Popen[str]:
    variables = {
        "torchrun": {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"},
        "slurm": {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_NODELIST": "a"},
    }[style]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment |= {"MASTER_PORT": str(port), "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
