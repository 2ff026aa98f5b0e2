"""Scans along a split dim: a local scan, then what the ranks before hand on, one plane from each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_gather_stack
from meshwright.parallel.functions import cause_for, function, placements_of
from meshwright.parallel.layout import axis_of, owned
from meshwright.parallel.mesh import coordinates
from meshwright.parallel.node import Node
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.rules.dimwise import along
from meshwright.parallel.tensor import is_mesh, wrap

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


class _Carry(Node):
    """The sum of what the ranks before this one (`after`: behind it) give; its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, mesh: DeviceMesh, axis: int, cause: Cause, after: bool) -> torch.Tensor:
        ctx.where = mesh, axis, cause, not after
        stacked, me = all_gather_stack(total, mesh, axis, cause), coordinates(mesh)[axis]
        return (stacked[me + 1 :] if after else stacked[:me]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Carry.apply(grad, *ctx.where), None, None, None, None


def _cumsum(local: torch.Tensor, dim: int, dtype: Any, mesh: DeviceMesh, axis: int, cause: Cause) -> torch.Tensor:
    """Running sums of this rank's part, on top of the total of the ranks before."""
    out_dtype = dtype or (local.dtype if local.is_floating_point() or local.is_complex() else torch.int64)
    wide = torch.float32 if out_dtype in _HALF else out_dtype
    total = local.sum(dim, keepdim=True, dtype=wide)
    carry: torch.Tensor = _Carry.apply(total, mesh, axis, cause, False)
    return (local.cumsum(dim, dtype=wide) + carry).to(out_dtype)


@function(torch.cumsum, torch.Tensor.cumsum)
def cumsum(input: Any, dim: Any, *, dtype: Any = None, out: Any = None) -> Any:
    """Backward is the running sum from the other end, without turning the tensor over."""
    if not is_mesh(input) or not isinstance(dim, int) or out is not None or not -input.ndim <= dim < input.ndim:
        return NotImplemented
    dim %= input.ndim
    axis = axis_of(placements_of(input), dim)
    if axis is None:
        return NotImplemented
    cause, mesh = cause_for("cumsum", input), input._spec.mesh
    local = _cumsum(to_local(input), dim, dtype, mesh, axis, cause)
    return from_local(local, mesh, placements_of(input), tuple(input.shape), cause.ledger)


@operator(aten.cumsum.default)
def cumsum_below(func: Any, args: Any, kwargs: Any) -> Any:
    """The same, asked for by the gradient of another operator."""
    x, dim = args[0], args[1] % max(1, args[0].ndim)
    axis = axis_of(placements_of(x), dim)
    if axis is None:
        return along(func, args, kwargs)
    mesh = x._spec.mesh
    local = _cumsum(x._local_tensor, dim, kwargs.get("dtype"), mesh, axis, cause_of(func, args))
    return wrap(local, mesh, placements_of(x), tuple(x._spec.shape), x._ledger)


@operator(aten.logcumsumexp.default)
def logcumsumexp(func: Any, args: Any, kwargs: Any) -> Any:
    """`log` of the running sum of exponentials."""
    x, dim = args[0], args[1] % max(1, args[0].ndim)
    axis = axis_of(placements_of(x), dim)
    if axis is None:
        return along(func, args, kwargs)
    mesh, local, cause = x._spec.mesh, x._local_tensor, cause_of(func, args)
    wide = local.float() if local.dtype in _HALF else local
    stacked = all_gather_stack(wide.logsumexp(dim, keepdim=True), mesh, axis, cause)
    out = wide.logcumsumexp(dim)
    me = coordinates(mesh)[axis]
    if me:
        out = torch.logaddexp(out, stacked[:me].logsumexp(0))
    return wrap(out.to(local.dtype), mesh, placements_of(x), tuple(x._spec.shape), x._ledger)


@operator(aten.cummax.default, aten.cummin.default)
def running_extreme(func: Any, args: Any, kwargs: Any) -> Any:
    """Values and global positions; among equals the last position and NaN above all, as on one device."""
    x, dim = args[0], args[1] % max(1, args[0].ndim)
    axis = axis_of(placements_of(x), dim)
    if axis is None:
        return along(func, args, kwargs)
    mesh, local, cause, shape = x._spec.mesh, x._local_tensor, cause_of(func, args), tuple(x._spec.shape)
    start, size = owned(mesh, placements_of(x), dim, shape[dim]).lo, local.shape[dim]
    plane = [1 if d == dim else n for d, n in enumerate(local.shape)]
    values, places = func(local, dim)
    places = places + start
    if size:
        last = values.narrow(dim, size - 1, 1), places.narrow(dim, size - 1, 1)
    else:
        last = local.new_zeros(plane), torch.full(plane, -1, device=local.device)
    before = all_gather_stack(last[0], mesh, axis, cause), all_gather_stack(last[1], mesh, axis, cause)
    me = coordinates(mesh)[axis]
    if me and size:  # then every rank before holds something
        carry, at = _later(func, before[0][:me].movedim(0, dim).flatten(dim, dim + 1), before[1][:me], dim)
        keep = values >= carry if func is aten.cummax.default else values <= carry
        if values.is_floating_point():
            keep = values.isnan() | (keep & ~carry.isnan())
        values, places = torch.where(keep, values, carry), torch.where(keep, places, at)
    return tuple(wrap(out, mesh, placements_of(x), shape, x._ledger) for out in (values, places))


def _later(func: Any, values: torch.Tensor, places: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The extreme of the ranks' last ones along `dim`, and where it is."""
    running, which = func(values, dim)
    at = places.movedim(0, dim).flatten(dim, dim + 1).gather(dim, which.narrow(dim, which.shape[dim] - 1, 1))
    return running.narrow(dim, running.shape[dim] - 1, 1), at
