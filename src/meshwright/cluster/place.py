"""The place of this process in its job, from environment variables alone: a pure function of a mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.errors import ConfigError

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = {LOOPBACK, "localhost", "::1"}
_TORCHRUN_PORT = 29500
_FIRST_DERIVED_PORT, _DERIVED_PORTS = 10_000, 20_000  # below the range from which systems hand out free ports


@dataclass(frozen=True)
class Place:
    """Rank and size of the job and of this host's part of it, and where the ranks meet (None: nobody has said)."""

    launcher: str
    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    hosts: int
    master_address: str | None
    master_port: int

    @property
    def is_one_host(self) -> bool:
        """Whether all ranks are on this host, so that every socket can stay on loopback."""
        return self.local_ranks == self.ranks


def find_place(env: Mapping[str, str]) -> Place:
    """The first of: torchrun's variables, Slurm's (more than one task), OpenMPI's; else one local process.

    Raises `ConfigError` naming the variable that is missing, no whole number, or out of range.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        place = _torchrun(env)
    elif "OMPI_COMM_WORLD_RANK" in env:
        place = _openmpi(env)
    # One task (an interactive shell, a batch script that starts its own ranks) is no group of ranks.
    elif "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        place = _slurm(env)
    else:
        return Place("local", 0, 1, 0, 1, 1, LOOPBACK, 0)
    if not (0 <= place.rank < place.ranks and 0 <= place.local_rank < place.local_ranks <= place.ranks):
        raise ConfigError(
            f"{place.launcher} says rank {place.rank} of {place.ranks}, local rank {place.local_rank} of "
            f"{place.local_ranks}: not a valid place; are its environment variables left over from another job?"
        )
    return place


def _torchrun(env: Mapping[str, str]) -> Place:
    ranks = _number(env, "WORLD_SIZE")
    address = env.get("MASTER_ADDR", LOOPBACK)
    # A launcher that gives no local size (one process a host is common) has at least the local ranks up to this one.
    here = ranks if address in _LOOPBACK_NAMES else _number(env, "LOCAL_RANK", 0) + 1
    local_ranks = _number(env, "LOCAL_WORLD_SIZE", here)
    rank = _number(env, "RANK")
    return Place(
        launcher="meshwright" if "MESHWRIGHT_LAUNCHED" in env else "torchrun",
        rank=rank,
        ranks=ranks,
        local_rank=_number(env, "LOCAL_RANK", rank % max(1, local_ranks)),
        local_ranks=local_ranks,
        hosts=_hosts(ranks, local_ranks),
        master_address=address if local_ranks == ranks else env.get("MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT", _TORCHRUN_PORT),
    )


def _openmpi(env: Mapping[str, str]) -> Place:
    ranks = _number(env, "OMPI_COMM_WORLD_SIZE")
    local_ranks = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", ranks)
    return Place(
        launcher="openmpi",
        rank=_number(env, "OMPI_COMM_WORLD_RANK"),
        ranks=ranks,
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_ranks=local_ranks,
        hosts=_hosts(ranks, local_ranks),
        master_address=env.get("MASTER_ADDR", LOOPBACK if local_ranks == ranks else None),
        master_port=_number(env, "MASTER_PORT", _TORCHRUN_PORT),
    )


def _slurm(env: Mapping[str, str]) -> Place:
    ranks = _number(env, "SLURM_NTASKS")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    hosts = expand_nodes(nodes)
    local_ranks = _slurm_local_ranks(env, ranks, max(1, len(hosts)))
    first = LOOPBACK if local_ranks == ranks else (hosts[0] if hosts else None)
    job = _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)
    return Place(
        launcher="slurm",
        rank=_number(env, "SLURM_PROCID"),
        ranks=ranks,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_ranks=local_ranks,
        hosts=max(1, len(hosts)),
        master_address=env.get("MASTER_ADDR", first),
        master_port=_number(env, "MASTER_PORT", _FIRST_DERIVED_PORT + job % _DERIVED_PORTS),
    )


def _slurm_local_ranks(env: Mapping[str, str], ranks: int, hosts: int) -> int:
    """Tasks on this node: `SLURM_STEP_TASKS_PER_NODE="4(x2),3"` has one count per node, in node order."""
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if per_node is None:
        # Without counts the tasks fill the nodes evenly, so no node has more than this.
        return min(ranks, _number(env, "SLURM_NTASKS_PER_NODE", _hosts(ranks, hosts)))
    counts: list[int] = []
    for entry in per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={per_node!r} is not a list such as '4(x2),3'")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node} has no entry in SLURM_TASKS_PER_NODE={per_node!r}")
    return counts[node]


def expand_nodes(text: str) -> tuple[str, ...]:
    """The hosts of a Slurm node list: `"a[1-3,07],b"` → `("a1", "a2", "a3", "a07", "b")`. Raises `ConfigError`."""
    entries = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text)
    hosts: list[str] = []
    for entry in entries:
        match = re.search(r"\[([^\]]*)\]", entry)
        if match is None:
            hosts.append(entry.strip())
            continue
        for span in match[1].split(","):
            first, _, last = span.partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise ConfigError(f"Slurm node list {text!r}: {span!r} is neither a number nor a range")
            for number in range(int(first), int(last or first) + 1):
                # what follows may hold a bracket of its own, as in "rack[1-2]node[1-4]"
                rest = expand_nodes(entry[match.end() :]) or ("",)
                hosts += [f"{entry[: match.start()]}{number:0{len(first)}d}{tail}" for tail in rest]
    return tuple(hosts)


def _hosts(ranks: int, local_ranks: int) -> int:
    return -(-ranks // max(1, local_ranks))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ConfigError(f"the environment variable {name} is missing, though others of its launcher are set")
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name}={text!r} is not a whole number") from None
