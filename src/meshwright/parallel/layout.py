"""Placements as arithmetic: which mesh axis splits which tensor dim, and which interval this rank owns."""

from __future__ import annotations

from functools import lru_cache

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from meshwright.parallel.mesh import coordinates, sizes
from meshwright.plan.geometry import Interval, chunk, chunks

Placements = tuple[Placement, ...]
REPLICATE = Replicate()
PARTIAL = Partial("sum")


@lru_cache(maxsize=4096)
def splits(placements: Placements) -> tuple[tuple[int, int], ...]:
    """The (axis, dim) pairs of the axes that split a dim."""
    return tuple((axis, p.dim) for axis, p in enumerate(placements) if isinstance(p, Shard))


@lru_cache(maxsize=4096)
def axis_of(placements: Placements, dim: int) -> int | None:
    """The axis that splits `dim`, or None."""
    return next((axis for axis, split in splits(placements) if split == dim), None)


@lru_cache(maxsize=4096)
def partial_axes(placements: Placements) -> tuple[int, ...]:
    """The axes along which the ranks hold summands of the value."""
    return tuple(axis for axis, p in enumerate(placements) if isinstance(p, Partial))


def replicated(mesh: DeviceMesh) -> Placements:
    """Equal on every rank."""
    return (REPLICATE,) * mesh.ndim


def split_axes(placements: Placements) -> tuple[int, ...]:
    """The axes that split some dim."""
    return tuple(axis for axis, _ in splits(placements))


def with_axis(placements: Placements, axis: int, placement: Placement) -> Placements:
    """The placements with that of one axis replaced."""
    return (*placements[:axis], placement, *placements[axis + 1 :])


@lru_cache(maxsize=16384)
def moved(placements: Placements, mapping: tuple[int | None, ...]) -> Placements:
    """The placements after dims were renumbered: old dim d is new dim mapping[d]; None drops the split."""

    def move(p: Placement) -> Placement:
        if not isinstance(p, Shard):
            return p
        new = mapping[p.dim]
        return REPLICATE if new is None else Shard(new)

    return tuple(move(p) for p in placements)


def owned(mesh: DeviceMesh, placements: Placements, dim: int, size: int) -> Interval:
    """The interval of a dim of global `size` that this rank holds."""
    axis = axis_of(placements, dim)
    if axis is None:
        return Interval(0, size)
    return chunk(size, sizes(mesh)[axis], coordinates(mesh)[axis])


def local_shape(mesh: DeviceMesh, placements: Placements, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of this rank's part of a tensor of global `shape`."""
    out = list(shape)
    for axis, dim in splits(placements):
        out[dim] = chunk(shape[dim], sizes(mesh)[axis], coordinates(mesh)[axis]).size
    return tuple(out)


Shares = tuple[tuple[int, tuple[float, ...]], ...]  # of the ranks along each of some axes, in what they split


@lru_cache(maxsize=4096)
def shares(ranks: tuple[int, ...], placements: Placements, shape: tuple[int, ...], dims: tuple[int, ...]) -> Shares:
    """Which part of `dims` each of the `ranks` of an axis holds, for every axis that splits one of them."""
    return tuple(
        (axis, tuple(part.size / max(1, shape[dim]) for part in chunks(shape[dim], ranks[axis])))
        for axis, dim in splits(placements)
        if dim in dims
    )


@lru_cache(maxsize=16384)
def global_strides(shape: tuple[int, ...], local_strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a dense tensor of global `shape` whose dims lie in memory in the order of the local part."""
    order = sorted(range(len(shape)), key=lambda dim: (local_strides[dim], -dim))
    strides = [0] * len(shape)
    step = 1
    for dim in order:
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)
