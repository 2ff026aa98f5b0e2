"""The ranks as a mesh: one axis of the plan is one axis of the mesh, with a process group along it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.cluster.process_group import ensure_process_group, set_time_limit, when_leaving
from meshwright.parallel.transport import channels
from meshwright.plan.plan import Plan

SUMS_LANE = 1  # of the groups for gradients: sums come back when they are ready, not in the order of the summands
_meshes: dict[tuple[object, ...], DeviceMesh] = {}


def default_device() -> torch.device:
    """This rank's device: its own GPU where there is one for each local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _limited(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh, with the time limit of an exchange on its groups (torch gives new groups 30 minutes)."""
    for axis in range(mesh.ndim):
        set_time_limit(mesh.get_group(axis))
    return mesh


def mesh_of(plan: Plan, device_type: str) -> DeviceMesh:
    """The mesh of a plan; one per plan value and process group. Raises `PlanError` if the ranks do not match."""
    ensure_process_group(plan.ranks)
    key = (plan, device_type, id(dist.group.WORLD))
    if key not in _meshes:
        sizes = tuple(axis.size for axis in plan.axes)
        names = tuple(axis.name for axis in plan.axes)
        mesh = _meshes[key] = _limited(init_device_mesh(device_type, sizes, mesh_dim_names=names))
        for axis in range(mesh.ndim):  # here, where all ranks come by: later each takes its own way
            channels(group(mesh, axis))
    return _meshes[key]


@lru_cache(maxsize=1024)
def home_dim(mesh: DeviceMesh, axis: int, ndim: int) -> int | None:
    """The dim that the plan splits along `axis` in a tensor of `ndim` dims in the customary order (see `Plan.dims`)."""
    plan = next((key[0] for key, known in _meshes.items() if known is mesh), None)
    return plan.dims(ndim)[axis] if isinstance(plan, Plan) and 2 <= ndim <= 5 else None


@lru_cache(maxsize=1024)
def group(mesh: DeviceMesh, axis: int) -> dist.ProcessGroup:
    """The process group of this rank along a mesh axis; the rank within it is the coordinate."""
    return mesh.get_group(axis)


@lru_cache(maxsize=1024)
def coordinates(mesh: DeviceMesh) -> tuple[int, ...]:
    """This rank's position along each axis."""
    position: Any = mesh.get_coordinate()
    return tuple(position)


@lru_cache(maxsize=1024)
def sizes(mesh: DeviceMesh) -> tuple[int, ...]:
    """The number of ranks along each axis."""
    return tuple(mesh.shape)


@lru_cache(maxsize=64)
def reduction_groups(mesh: DeviceMesh) -> tuple[dist.ProcessGroup, DeviceMesh]:
    """Groups for gradients alone: all ranks, and a mesh of the same shape with groups of its own.

    Buckets start whenever their gradients are ready, which is not the same moment on every rank, so they must not
    share the order of the exchanges. Collective on the first call.
    """
    world = dist.new_group(list(range(mesh.size())))
    set_time_limit(world)
    names = tuple(mesh.mesh_dim_names or ())
    own = _limited(init_device_mesh(mesh.device_type, sizes(mesh), mesh_dim_names=names))
    for pg in (world, *(own.get_group(axis) for axis in range(own.ndim))):
        for lane in (0, SUMS_LANE):
            channels(pg, lane)
    return world, own


def _forget() -> None:
    _meshes.clear()
    for cached in (home_dim, group, coordinates, sizes, reduction_groups):
        cached.cache_clear()


when_leaving(_forget)
