"""The same step under every launcher: `mw.launch`, torchrun, Slurm, OpenMPI, and on two hosts.

Hosts are network namespaces joined by a pair of virtual interfaces; whoever may not make them skips these by name.
Slurm and OpenMPI are their environment variables around real processes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from launcher_job import step, work

import meshwright as mw

JOB = Path(__file__).with_name("launcher_job.py")
LIMIT_S = 120.0
TOLERANCE = 1e-8  # of a whole model, see DESIGN "How errors are measured"
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "GROUP_", "ROLE_", "GLOO_")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = ("10.203.7.1", "10.203.7.2")
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Start:
    """One process to start: a command and what its environment says besides the usual."""

    command: Sequence[str]
    env: dict[str, str]


def clean_environment() -> dict[str, str]:
    """This environment without what a launcher may have left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = [str(JOB.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "MESHWRIGHT_TIMEOUT_S": "60"}


def run(starts: Sequence[Start], out: Path) -> Values:
    """Start all, wait for all, read what rank 0 wrote. None outlives this call."""
    processes = [
        subprocess.Popen(
            start.command,
            env=clean_environment() | start.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for start in starts
    ]
    try:
        texts = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to its ranks
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
    codes = [process.returncode for process in processes]
    assert not any(codes), f"ended with {codes}:\n" + "\n".join(text[-3000:] for text in texts)
    with np.load(out, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def same(found: Values, truth: Values, launcher: str, hosts: int = 1) -> None:
    """Every quantity agrees, and the job was what it was meant to be."""
    assert (str(found.pop("launcher")), int(found.pop("hosts"))) == (launcher, hosts)
    assert set(found) == set(truth)
    largest = max(abs(value).max() for value in truth.values())
    for name, value in truth.items():
        error = abs(found[name] - value).max() / max(abs(value).max(), 1e-3 * largest)
        assert error <= TOLERANCE, f"{name}: error {error:.3g}"


@pytest.fixture(scope="module")
def truth() -> Values:
    """One device."""
    return step(None)


@pytest.mark.parametrize("plan", ["d2", "d2h2"])
def test_torchrun_gives_what_launch_gives(plan: str, truth: Values, tmp_path: Path) -> None:
    ranks = {"d2": 2, "d2h2": 4}[plan]
    local = mw.launch(work, ranks=ranks, args=(plan,), threads=1)
    same(local[0] | {"launcher": np.array("local"), "hosts": np.array(1)}, truth, "local")
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", str(JOB), plan, str(tmp_path / "out.npz")]
    found = run([Start(command, {})], tmp_path / "out.npz")
    for name, value in local[0].items():
        assert np.array_equal(found[name], value), f"{name}: other bits than under mw.launch"
    same(found, truth, "torchrun")


def slurm(rank: int, ranks: int, per_host: int, job: int, nodes: str) -> dict[str, str]:
    """What srun sets."""
    hosts = ranks // per_host
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(ranks),
        "SLURM_LOCALID": str(rank % per_host),
        "SLURM_NODEID": str(rank // per_host),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_host}(x{hosts})" if hosts > 1 else str(per_host),
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_JOB_ID": str(job),
    }


def openmpi(rank: int, ranks: int, per_host: int) -> dict[str, str]:
    """What mpirun sets."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(ranks),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % per_host),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(per_host),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_slurm(truth: Values, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    port = {"MASTER_PORT": str(free_port())}
    command = [sys.executable, str(JOB), "w2", str(out)]
    same(run([Start(command, slurm(rank, 2, 2, 4711, "alone") | port) for rank in range(2)], out), truth, "slurm")


def test_openmpi(truth: Values, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    port = {"MASTER_PORT": str(free_port())}
    command = [sys.executable, str(JOB), "n2d2", str(out)]
    same(run([Start(command, openmpi(rank, 4, 4) | port) for rank in range(4)], out), truth, "openmpi")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable, each with its own loopback; gone afterwards."""
    hosts = tuple(f"mw{side}-{os.getpid()}" for side in "ab")
    cable = [f"mw{side}{os.getpid()}" for side in "ab"]
    made: list[str] = []
    try:
        for host in hosts:
            ip("netns", "add", host)
            made.append(host)
        ip("link", "add", cable[0], "netns", hosts[0], "type", "veth", "peer", "name", cable[1], "netns", hosts[1])
        for host, end, address in zip(hosts, cable, ADDRESSES, strict=True):
            ip("-n", host, "link", "set", end, "name", "fabric0")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "fabric0")
            for device in ("lo", "fabric0"):
                ip("-n", host, "link", "set", device, "up")
        yield hosts[0], hosts[1]
    finally:
        for host in made:
            ip("netns", "delete", host)  # its interfaces go with it


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (Debian: apt install iproute2)")
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError as error:
            if error.cmd[2] != "add":
                raise
            pytest.skip(f"`ip {error.cmd[1]} add` is not permitted here: {error.stderr.strip()}")
        yield pair


# Inside its own namespace a fixed port meets nobody else.
MEETING = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "fabric0"}


def on(host: str, command: Sequence[str], env: dict[str, str]) -> Start:
    return Start(["ip", "netns", "exec", host, *command], env | {"GLOO_SOCKET_IFNAME": "fabric0"})


def test_torchrun_on_two_hosts(hosts: tuple[str, str], truth: Values, tmp_path: Path) -> None:
    """One torchrun in each, two ranks a host."""
    out = tmp_path / "out.npz"
    meeting = [f"--master-addr={ADDRESSES[0]}", "--master-port=29500", "--nnodes=2", "--nproc-per-node=2"]
    starts = [
        on(host, [*TORCHRUN, *meeting, f"--node-rank={index}", str(JOB), "d2h2", str(out)], {})
        for index, host in enumerate(hosts)
    ]
    same(run(starts, out), truth, "torchrun", hosts=2)


def test_slurm_on_two_hosts(hosts: tuple[str, str], truth: Values, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    command = [sys.executable, str(JOB), "d2h2", str(out)]
    starts = [on(hosts[r // 2], command, slurm(r, 4, 2, 4712, "node[1-2]") | MEETING) for r in range(4)]
    same(run(starts, out), truth, "slurm", hosts=2)


def test_openmpi_on_two_hosts(hosts: tuple[str, str], truth: Values, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    command = [sys.executable, str(JOB), "d2", str(out)]
    starts = [on(hosts[r], command, openmpi(r, 2, 1) | MEETING) for r in range(2)]
    same(run(starts, out), truth, "openmpi", hosts=2)
