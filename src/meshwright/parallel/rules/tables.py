"""Elementwise work against a small table that every rank holds whole, and counts into one: nothing else is sent."""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.comm import all_reduce
from meshwright.parallel.functions import function, placements_of
from meshwright.parallel.layout import PARTIAL, REPLICATE, replicated, split_axes, splits
from meshwright.parallel.operators import POINTWISE, cause_of, operator, placed
from meshwright.parallel.rules.extremes import extreme
from meshwright.parallel.rules.pointwise import common_layout, cut, pointwise, to_parts
from meshwright.parallel.rules.reduce import arguments
from meshwright.parallel.tensor import is_mesh, ledger_of, like, mesh_tensors, wrap

aten = torch.ops.aten
POINTWISE |= {aten.polar.default, aten.complex.default}


def _held(table: Any, mesh: Any, cause: Any) -> torch.Tensor:
    return placed(table, replicated(mesh), cause) if is_mesh(table) else table


@operator(aten.bucketize.Tensor, aten.isin.Tensor_Tensor)
def against_table(func: Any, args: Any, kwargs: Any) -> Any:
    """The interval, or the membership, of every element."""
    x, table = args
    if not is_mesh(x):
        return NotImplemented
    return like(func(x._local_tensor, _held(table, x._spec.mesh, cause_of(func, args)), **kwargs), x)


@operator(aten.searchsorted.Tensor)
def searchsorted(func: Any, args: Any, kwargs: Any) -> Any:
    """Into one sorted list; into a list for each row where both have the same rows and whole ones."""
    table, x = args
    if kwargs.get("sorter") is not None or not is_mesh(x):
        return NotImplemented
    cause, mesh, placements = cause_of(func, args), x._spec.mesh, placements_of(x)
    if table.ndim == 1:
        return like(func(_held(table, mesh, cause), x._local_tensor, **kwargs), x)
    rows = tuple(REPLICATE if getattr(p, "dim", None) == x.ndim - 1 else p for p in placements)
    local = placed(table, rows, cause) if is_mesh(table) else cut(table, rows, mesh)
    return like(func(local, x._local_tensor.contiguous(), **kwargs), x)


@operator(aten.embedding.default)
def embedding(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a table at split positions."""
    weight, index = args[:2]
    if not is_mesh(index):
        return NotImplemented
    mesh = index._spec.mesh
    out = func(_held(weight, mesh, cause_of(func, args)), index._local_tensor, *args[2:], **kwargs)
    shape = (*index._spec.shape, weight.shape[1])
    return wrap(out, mesh, placements_of(index), shape, ledger_of([weight, index]))


@operator(aten.embedding_dense_backward.default)
def embedding_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The ranks' sums are summands of the table's gradient."""
    grad, index, rows, padding, by_frequency = args
    if not is_mesh(index) or not is_mesh(grad) or by_frequency:
        return NotImplemented
    mesh, target = index._spec.mesh, placements_of(index)
    local = placed(grad, target, cause_of(func, args))
    out = func(local, index._local_tensor, rows, padding, by_frequency)
    axes = split_axes(target)
    placements = tuple(PARTIAL if axis in axes else REPLICATE for axis in range(mesh.ndim))
    return wrap(out, mesh, placements, (rows, grad.shape[-1]), grad._ledger)


@operator(aten.histc.default)
def histc(func: Any, args: Any, kwargs: Any) -> Any:
    """Local histograms over the same range, added up."""
    a = arguments(func, args, kwargs)
    x, low, high = a["self"], a["min"], a["max"]
    cause, mesh = cause_of(func, args), x._spec.mesh
    if low == high and x.numel():
        low = extreme(aten.min.default, (x,), {})._local_tensor.item()
        high = extreme(aten.max.default, (x,), {})._local_tensor.item()
    if low == high:  # as on one device
        low, high = low - 1, high + 1
    out = func(x._local_tensor, a["bins"], low, high)
    return wrap(all_reduce(out, mesh, split_axes(placements_of(x)), cause), mesh, replicated(mesh), None, x._ledger)


@operator(aten.bincount.default)
def bincount(func: Any, args: Any, kwargs: Any) -> Any:
    """Local counts, added up."""
    a = arguments(func, args, kwargs)
    x, weights, least = a["self"], a["weights"], a["minlength"]
    if not is_mesh(x):
        return NotImplemented
    cause, mesh, target = cause_of(func, args), x._spec.mesh, placements_of(x)
    size = max(least, int(extreme(aten.max.default, (x,), {})._local_tensor.item()) + 1) if x.numel() else least
    if weights is not None:
        weights = placed(weights, target, cause) if is_mesh(weights) else cut(weights, target, mesh)
    out = func(x._local_tensor, weights, size)
    return wrap(all_reduce(out, mesh, split_axes(target), cause), mesh, replicated(mesh), None, x._ledger)


@operator(aten.equal.default)
def equal(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether all elements are equal, on every rank alike."""
    a, b = args
    if a.shape != b.shape:
        return False
    same = pointwise(aten.eq.Tensor, (a, b), {})
    local, mesh = same._local_tensor.all(), same._spec.mesh
    return bool(all_reduce(local, mesh, split_axes(placements_of(same)), cause_of(func, args), "min"))


@function(torch.allclose, torch.Tensor.allclose)
def allclose(input: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Whether all elements are close, on every rank alike."""
    return bool(torch.isclose(input, other, rtol, atol, equal_nan).all())


@operator(aten.linalg_cross.default)
def cross(func: Any, args: Any, kwargs: Any) -> Any:
    """The cross product along a whole dim of size 3."""
    a, b = args
    meshed, cause = mesh_tensors(args), cause_of(func, args)
    mesh, shape = meshed[0]._spec.mesh, tuple(torch.broadcast_shapes(a.shape, b.shape))
    dim = kwargs.get("dim", -1) % len(shape)
    target = tuple(REPLICATE if getattr(p, "dim", None) == dim else p for p in common_layout(meshed, shape))
    if target != common_layout(meshed, shape) or not splits(target):
        return NotImplemented
    parts = to_parts([a, b], shape, target, mesh, cause)
    return wrap(func(*parts, **kwargs), mesh, target, shape, ledger_of(meshed))
