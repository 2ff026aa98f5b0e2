"""Which launcher started this process, from faked environments; and what the machine says about itself."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest
import torch

from meshwright.cluster import machine
from meshwright.cluster.cluster import Cluster
from meshwright.cluster.place import expand_nodes
from meshwright.cluster.process_group import join_cluster
from meshwright.errors import ConfigError, PlanError

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "1234567",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "4242",
}


def facts(env: dict[str, str]) -> tuple[Any, ...]:
    found = Cluster.detect(env)
    place = (found.launcher, found.rank, found.ranks, found.local_rank, found.local_ranks, found.hosts)
    return (*place, found.master_address)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("local", 0, 1, 0, 1, 1, "127.0.0.1")),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4, 2, "10.0.0.7")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("torchrun", 1, 2, 1, 2, 1, "127.0.0.1")),
        # one process a host, as many Kubernetes operators start them
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, ("torchrun", 1, 2, 0, 1, 2, "pod-0")),
        (TORCHRUN | {"MESHWRIGHT_LAUNCHED": "1"}, ("meshwright", 5, 8, 1, 4, 2, "10.0.0.7")),
        (SLURM, ("slurm", 5, 8, 1, 4, 2, "node07")),
        (SLURM | {"MASTER_ADDR": "ib07"}, ("slurm", 5, 8, 1, 4, 2, "ib07")),
        (SLURM | {"SLURM_TASKS_PER_NODE": "5,3", "SLURM_NODEID": "1"}, ("slurm", 5, 8, 1, 3, 2, "node07")),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, ("slurm", 5, 8, 1, 4, 2, "node07")),
        (SLURM | {"SLURM_JOB_NODELIST": "a", "SLURM_NTASKS_PER_NODE": "8"}, ("slurm", 5, 8, 1, 8, 1, "127.0.0.1")),
        (SLURM | {"SLURM_NTASKS": "1"}, ("local", 0, 1, 0, 1, 1, "127.0.0.1")),
        (SLURM | TORCHRUN, ("torchrun", 5, 8, 1, 4, 2, "10.0.0.7")),
        (OPENMPI | {"MASTER_ADDR": "head"}, ("openmpi", 3, 4, 1, 2, 2, "head")),
        (OPENMPI, ("openmpi", 3, 4, 1, 2, 2, None)),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("openmpi", 3, 4, 1, 4, 1, "127.0.0.1")),
    ],
)
def test_the_launcher_is_found(env: dict[str, str], expected: tuple[Any, ...]) -> None:
    assert facts(env) == expected


def test_ports() -> None:
    assert Cluster.detect(TORCHRUN).master_port == 4242
    assert Cluster.detect(SLURM | {"MASTER_PORT": "99"}).master_port == 99
    ports = {Cluster.detect(SLURM | {"SLURM_JOB_ID": str(job)}).master_port for job in range(1000, 1100)}
    assert len(ports) == 100, "jobs that share a host do not meet each other"
    assert all(1024 < port < 32768 for port in ports)


def test_devices_are_this_hosts() -> None:
    found = Cluster.detect({})
    assert found.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(found.device_names) == found.device_count >= 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is missing"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID is missing"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "four"}, "SLURM_TASKS_PER_NODE='four'"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4", "SLURM_NODEID": "1"}, "SLURM_NODEID=1 has no entry"),
        (SLURM | {"SLURM_JOB_NODELIST": "node[a-b]"}, "neither a number nor a range"),
    ],
)
def test_a_broken_environment_is_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Cluster.detect(env)


def test_openmpi_on_hosts_without_a_meeting_place_says_what_to_set() -> None:
    with pytest.raises(PlanError, match="set MASTER_ADDR"):
        join_cluster(Cluster.detect(OPENMPI), timeout_s=1.0)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("alone", ("alone",)),
        ("a,b", ("a", "b")),
        ("n[1-3,07],b", ("n1", "n2", "n3", "n07", "b")),
        ("n[098-101]", ("n098", "n099", "n100", "n101")),
        ("rack[1-2]n[3-4]", ("rack1n3", "rack1n4", "rack2n3", "rack2n4")),
        ("n[1-2]-ib,x[9]", ("n1-ib", "n2-ib", "x9")),
    ],
)
def test_slurm_node_lists(text: str, hosts: tuple[str, ...]) -> None:
    assert expand_nodes(text) == hosts


def test_the_machine_describes_itself_in_plain_values() -> None:
    found = machine.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "gloo" in found["backends"]


def test_the_description_names_neither_host_nor_user() -> None:
    words = set(json.dumps(machine.describe()).replace('"', " ").split())
    assert not words & {socket.gethostname(), socket.getfqdn(), os.path.expanduser("~")}


def test_what_is_missing_comes_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    found = {gap.what: gap.how for gap in machine.missing()}
    assert found["nibabel"] == "pip install 'meshwright[nifti]'"
    assert found["nilearn"] == "pip install 'meshwright[examples]'"
    assert "chromium" in found["chromium"]


CGROUPS = {
    "version 2, a limit above the own group": (
        {
            "/proc/self/cgroup": "0::/job.slice/step.scope\n",
            "/sys/fs/cgroup/job.slice/step.scope/memory.max": "max\n",
            "/sys/fs/cgroup/job.slice/memory.max": "3000\n",
            "/sys/fs/cgroup/job.slice/memory.current": "2500\n",
            "/sys/fs/cgroup/job.slice/memory.stat": "anon 100\ninactive_file 1500\nactive_file 5\n",
        },
        (3000, 2000),
    ),
    "version 2 as a container sees it": (
        {
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/memory.max": "4000\n",
            "/sys/fs/cgroup/memory.current": "3900\n",
        },
        (4000, 100),
    ),
    "version 1": (
        {
            "/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/slurm/job_1\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "70\n",
            "/sys/fs/cgroup/memory/slurm/job_1/memory.limit_in_bytes": "2000\n",
            "/sys/fs/cgroup/memory/slurm/job_1/memory.usage_in_bytes": "1200\n",
            "/sys/fs/cgroup/memory/slurm/job_1/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
        },
        (2000, 1000),
    ),
    "none": ({}, (8 * 1024, 6 * 1024)),
}


@pytest.mark.parametrize("name", list(CGROUPS))
def test_memory_under_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest limit of the control groups around this process, and what is left below each."""
    files, expected = CGROUPS[name]
    files = files | {"/proc/meminfo": "MemTotal: 8 kB\nMemAvailable: 6 kB\n"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(str(path), ""))
    assert (machine.memory_bytes(), machine.available_bytes()) == expected
