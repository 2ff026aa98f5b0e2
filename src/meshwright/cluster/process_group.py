"""Joining and leaving `torch.distributed`, without a socket that listens on more than it must."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from meshwright.cluster.limits import RENDEZVOUS_TIMEOUT_S, exchange_timeout_s
from meshwright.cluster.place import Place, find_place
from meshwright.errors import ConfigError, PlanError

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_forget: list[Callable[[], None]] = []
_HOW = "start as many ranks as the plan needs: mw.launch(fn, ranks=…), torchrun --nproc-per-node=…, srun or mpirun"


def store_server(address: str, port: int, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """Host the rendezvous store on `address` only; port 0 picks a free one. Returns the store and its port.

    `TCPStore` on its own listens on every interface, so it is handed a socket that is already bound.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listener:
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=timeout_s),
        )
    return store, port


def backend_for(local_ranks: int) -> str:
    """NCCL besides gloo when every local rank has a GPU of its own, else gloo alone."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def ranks_here() -> int:
    """How many ranks of the job this host runs; all of them where whoever joined has not said."""
    try:
        place = find_place(os.environ)
    except ConfigError:  # left over from another job
        place = None
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return place.local_ranks if place is not None and place.ranks == ranks else ranks


def store_client(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that another process hosts."""
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=meeting_s(timeout_s)))


def meeting_s(timeout_s: float) -> float:
    """The limit of the first meeting, when the limit of an exchange is `timeout_s`."""
    return max(timeout_s, RENDEZVOUS_TIMEOUT_S)


def join(store: dist.Store, rank: int, ranks: int, *, local_rank: int, local_ranks: int, timeout_s: float) -> None:
    """Meet the other ranks at the store and make the default process group; `timeout_s` limits each exchange.

    Raises torch's `DistStoreError` when a rank does not come to the meeting.
    """
    store.set(f"meshwright/here/{rank}", "1")
    others = [f"meshwright/here/{other}" for other in range(ranks)]
    store.wait(others, timedelta(seconds=meeting_s(timeout_s)))
    limit = timedelta(seconds=timeout_s)
    store.set_timeout(limit)
    backend = backend_for(local_ranks)
    if "nccl" in backend:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)


def join_cluster(place: Place, timeout_s: float) -> None:
    """The process group of a job that torchrun, Slurm or OpenMPI started; closed when this process exits.

    Ranks of one host use loopback only. Raises `PlanError` when nobody has said where the ranks meet.
    """
    if place.master_address is None:
        raise PlanError(
            f"{place.launcher} started {place.ranks} ranks on {place.hosts} hosts but not where they meet: "
            "set MASTER_ADDR to the host of rank 0 (and MASTER_PORT to a free port there) on every rank"
        )
    hosts_store = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _cluster_store(place, place.master_address, timeout_s, hosts_store)
    with _gloo_on_loopback(place.is_one_host):
        join(
            store,
            place.rank,
            place.ranks,
            local_rank=place.local_rank,
            local_ranks=place.local_ranks,
            timeout_s=timeout_s,
        )
    atexit.register(leave)


def _cluster_store(place: Place, address: str, timeout_s: float, hosts_store: bool) -> dist.TCPStore:
    if not hosts_store:
        return store_client(address, place.master_port, timeout_s)
    if place.is_one_host:
        store, _ = store_server(address, place.master_port, meeting_s(timeout_s))
        return store
    limit = timedelta(seconds=meeting_s(timeout_s))
    return dist.TCPStore(address, place.master_port, is_master=True, wait_for_workers=False, timeout=limit)


def join_alone(timeout_s: float) -> None:
    """A process group of this process only: no store server, and gloo bound to loopback."""
    with _gloo_on_loopback(True):
        store, limit = dist.HashStore(), timedelta(seconds=timeout_s)
        dist.init_process_group(backend_for(1), store=store, rank=0, world_size=1, timeout=limit)
    atexit.register(leave)


def ensure_process_group(ranks: int) -> None:
    """Make sure this process is in a process group of `ranks` ranks; one rank needs nobody else.

    Raises `PlanError` when the group or the job has another size, or when this process has no rank at all.
    """
    if dist.is_initialized():
        found = dist.get_world_size()
        if found != ranks:
            raise PlanError(f"the plan needs {ranks} ranks, but the process group has {found}; {_HOW}")
        return
    place = find_place(os.environ)
    if place.launcher != "local" and place.ranks == ranks:
        join_cluster(place, exchange_timeout_s())
    elif place.launcher == "local" and ranks == 1:
        join_alone(exchange_timeout_s())
    elif place.launcher == "local":
        raise PlanError(f"the plan needs {ranks} ranks, but this is a single process; {_HOW}")
    else:
        raise PlanError(f"the plan needs {ranks} ranks, but {place.launcher} started {place.ranks}; {_HOW}")


def set_time_limit(group: dist.ProcessGroup, timeout_s: float | None = None) -> None:
    """Limit each exchange in `group`: torch gives a group made later 30 minutes, whatever the default group has."""
    kinds = {device.type for device in group._device_types}
    for kind in kinds & {"cpu", "cuda"}:
        group._get_backend(torch.device(kind))._set_default_timeout(timedelta(seconds=exchange_timeout_s(timeout_s)))


@contextmanager
def _gloo_on_loopback(wanted: bool) -> Iterator[None]:
    """gloo reads its interface from the environment when a group is made; ranks of one host need no other."""
    if not wanted:
        yield
        return
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def when_leaving(forget: Callable[[], None]) -> None:
    """Have `forget` drop what it keeps of the process groups before they are closed, or this process ends."""
    if not _forget:
        atexit.register(_drop)  # whoever made the groups
    _forget.append(forget)


def _drop() -> None:
    for forget in _forget:
        forget()


def leave() -> None:
    """Close every process group of this process, if there is one, and end their threads.

    gloo ends the threads of a group with the last reference to it. One that lives on while the interpreter ends may
    ask for its lock to free a tensor, and the process then aborts ("terminate called without an active exception").
    """
    if dist.is_initialized():
        _drop()
        dist.destroy_process_group()
        gc.collect()
