"""Joining and leaving `torch.distributed`, without a socket that listens on more than it must."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from meshwright.cluster.limits import RENDEZVOUS_TIMEOUT_S

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


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


def join(
    rank: int,
    ranks: int,
    address: str,
    port: int,
    *,
    local_rank: int,
    timeout_s: float,
    local_ranks: int | None = None,
    host_store: bool = False,
) -> None:
    """Meet the other ranks at the store and make the default process group; `timeout_s` limits each exchange.

    With `host_store` rank 0 hosts the store itself. Raises torch's own error when a rank does not come.
    """
    meeting_s = max(timeout_s, RENDEZVOUS_TIMEOUT_S)
    store: dist.Store
    if host_store and rank == 0:
        store, _ = store_server(address, port, meeting_s)
    else:
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=meeting_s))
    store.set(f"meshwright/here/{rank}", "1")
    store.wait([f"meshwright/here/{other}" for other in range(ranks)], timedelta(seconds=meeting_s))
    store.set_timeout(timedelta(seconds=timeout_s))
    backend = backend_for(local_ranks or ranks)
    if "nccl" in backend:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))


def join_alone(timeout_s: float) -> None:
    """A process group of this process only: no store server, and gloo bound to loopback."""
    with _gloo_on_loopback():
        dist.init_process_group(
            backend_for(1), store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_s)
        )


@contextmanager
def _gloo_on_loopback() -> Iterator[None]:
    """gloo reads its interface from the environment when a group is made; a lone rank needs no other."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before


def leave() -> None:
    """Close every process group of this process."""
    dist.destroy_process_group()
