"""Runs in the ranks of the socket test."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist
from sockets import listening
from torch.distributed.device_mesh import init_device_mesh


def listening_of_the_family(parent: int) -> dict[str, list[str]]:
    """On rank 0: process → addresses, for the caller, its helpers and all ranks, while two meshes are in use."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for name in ("a", "b"):
        dist.all_reduce(torch.ones(1), group=mesh.get_group(name))
    found = {}
    if dist.get_rank() == 0:
        caller = psutil.Process(parent)
        found = {f"{each.pid}": listening(each.pid) for each in [caller, *caller.children(recursive=True)]}
    dist.barrier()  # nobody leaves before the table is read
    return found
