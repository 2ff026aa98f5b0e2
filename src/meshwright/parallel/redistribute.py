"""Moving between placements; differentiable.

A gradient is a mesh tensor like any other: its *global* value is what counts. Where a replicated tensor was used by
computations that ranks did on different data, its gradient is Partial (the ranks hold summands) and stays so as
long as only linear work touches it: parameter gradients are then summed once, in buckets (`meshwright.sync`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import layer
from meshwright.parallel.comm import Cause, all_gather_dim, all_reduce, swap_dims
from meshwright.parallel.layout import REPLICATE, Placements, replicated, splits
from meshwright.parallel.mesh import coordinates, sizes
from meshwright.parallel.node import Node
from meshwright.parallel.tensor import MeshTensor, fresh, is_mesh, wrap
from meshwright.plan.geometry import chunk


def move(
    local: torch.Tensor,
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    source: Placements,
    target: Placements,
    cause: Cause,
) -> torch.Tensor:
    """The local part under `target` from the local part under `source`; no autograd. Collective."""
    if source == target:
        return local
    held = list(source)
    for axis, new in enumerate(target):  # first whatever makes parts larger: sums, and splits that end
        old = held[axis]
        if isinstance(old, Partial) and old != new:
            local = all_reduce(local, mesh, [axis], cause, str(old.reduce_op))
            held[axis] = REPLICATE
        elif isinstance(old, Shard) and old != new:
            taken = any(isinstance(p, Shard) and p.dim == getattr(new, "dim", None) for p in held)
            if isinstance(new, Shard) and not taken:
                local = swap_dims(local, mesh, axis, old.dim, new.dim, shape, cause)
                held[axis] = new
            else:
                local = all_gather_dim(local, mesh, axis, old.dim, shape[old.dim], cause)
                held[axis] = REPLICATE
    for axis, new in enumerate(target):  # then whatever only drops data
        if held[axis] == new:
            continue
        if isinstance(new, Shard):
            span = chunk(shape[new.dim], sizes(mesh)[axis], coordinates(mesh)[axis])
            local = local.narrow(new.dim, span.lo, span.size)
        elif coordinates(mesh)[axis]:  # to Partial: the first rank keeps the value, the others add nothing
            local = torch.zeros_like(local)
    return local


_alias: Any = torch.ops.aten.alias.default._op  # without the Python around it


def same(local: torch.Tensor) -> torch.Tensor:
    """A view with equal strides. (`view_as` changes the stride of a batch of one, by which torch then no longer
    recognises `channels_last` and takes slow kernels.)"""
    return _alias(local)


def one_split_per_dim(placements: Placements) -> bool:
    """Whether no dim is split by two axes at once (such layouts are not used here)."""
    dims = [dim for _, dim in splits(placements)]
    return len(dims) == len(set(dims))


def meshed_gradient(grad: Any, mesh: DeviceMesh) -> Any:
    """A gradient as a mesh tensor: autograd may hand over plain zeros, of which torch keeps the shape alone."""
    if is_mesh(grad):
        return grad
    return wrap(torch.zeros_like(grad) if grad._is_zerotensor() else grad, mesh, replicated(mesh))


class _Redistribute(Node):
    @staticmethod
    def forward(ctx: Any, x: Any, target: Placements, cause: Cause) -> MeshTensor:
        mesh, shape = x._spec.mesh, tuple(x._spec.shape)
        ctx.mesh, ctx.source, ctx.cause = mesh, tuple(x._spec.placements), cause
        local = move(x._local_tensor, mesh, shape, ctx.source, target, cause)
        if local is x._local_tensor:
            local = same(local)
        return wrap(local, mesh, target, shape, x._ledger)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grad = meshed_gradient(grad, ctx.mesh)
        return redistribute(grad, gradient_placements(ctx.source, grad), ctx.cause), None, None


def gradient_placements(source: Placements, grad: Any) -> Placements:
    """How the gradient of a tensor placed as `source` is best held: its splits; sums stay unsummed."""
    return tuple(
        old if isinstance(old, Shard) else (now if isinstance(now, Partial) else REPLICATE)
        for old, now in zip(source, grad._spec.placements, strict=True)
    )


def redistribute(x: Any, target: Placements, cause: Cause | None = None) -> Any:
    """The same global value under `target`. Raises `UnsupportedError` if two axes would split one dim."""
    if x._frozen_view:
        fresh(x)
    if tuple(x._spec.placements) == target:
        return x
    ndim = len(x._spec.shape)
    target = tuple(Shard(p.dim % ndim) if isinstance(p, Shard) else p for p in target)
    if not one_split_per_dim(target):
        raise UnsupportedError(f"two mesh axes cannot split the same dim: {target}")
    return _Redistribute.apply(x, target, cause or Cause(x._ledger, (layer(), "redistribute")))


def replicate(x: Any, cause: Cause | None = None) -> Any:
    """The same value, whole on every rank."""
    return redistribute(x, (REPLICATE,) * len(x._spec.placements), cause)
