"""Positions given as tensors: `x[:, [2, 0]]`, `index_select`, lookups in a table, masks.

Indexed dims that are split move their splits to other dims (all-to-all). Positions themselves are small and made
whole; a table that every rank holds is looked up where the positions are. Masks of the same shape as the tensor are
elementwise; the number of elements that a mask selects depends on the data, so that selection is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Shard

from meshwright.parallel.layout import PARTIAL, REPLICATE, Placements, moved, replicated, splits
from meshwright.parallel.mesh import coordinates
from meshwright.parallel.operators import cause_of, mutable, operator, placed
from meshwright.parallel.rules.aside import aside, home, whole_dims
from meshwright.parallel.rules.dimwise import resized
from meshwright.parallel.rules.pointwise import common_layout, cut, pointwise, to_parts
from meshwright.parallel.tensor import is_mesh, ledger_of, like, mesh_tensors, wrap

aten = torch.ops.aten
_WHOLE_NUMBERS = (torch.int64, torch.int32)
_BOOLEAN = (torch.bool, torch.uint8)


def _whole(index: Any, mesh: Any, cause: Any) -> Any:
    return placed(index, replicated(mesh), cause) if is_mesh(index) else index


def _positions(x: Any, indices: Any) -> list[Any] | None:
    """The indices with masks of one dim, known to every rank, as positions; None if there are other masks."""
    out = []
    for index in indices:
        if index is not None and index.dtype in _BOOLEAN:
            if index.ndim != 1 or (is_mesh(index) and splits(tuple(index._spec.placements))):
                return None
            index = (index._local_tensor if is_mesh(index) else index).nonzero().squeeze(1)
        elif index is not None and index.dtype not in _WHOLE_NUMBERS:
            return None
        out.append(index)
    return out if any(index is not None for index in out) else None


def _mapping(x: Any, indices: Any) -> tuple[tuple[int | None, ...], list[int]]:
    """Where the dims of `x[indices]` that are not indexed go, and the dims that are."""
    used = [dim for dim, index in enumerate(indices) if index is not None]
    wide = max(indices[dim].ndim for dim in used)
    together = used == list(range(used[0], used[-1] + 1))
    mapping: list[int | None] = []
    for dim in range(x.ndim):
        before = sum(1 for other in range(dim) if other not in used)
        mapping.append(None if dim in used else before + (wide if not together or dim > used[0] else 0))
    return tuple(mapping), used


def _lookup(x: Any, indices: list[Any], used: list[int]) -> tuple[Placements, list[torch.Tensor], int] | None:
    """Of a table held whole: the layout of the result, this rank's positions, and the dim they begin at."""
    given = [indices[dim] for dim in used]
    meshed = [i for i in given if is_mesh(i)]
    whole = not is_mesh(x) or not splits(tuple(x._spec.placements))
    if not whole or not any(splits(tuple(i._spec.placements)) for i in meshed):
        return None
    shape = tuple(torch.broadcast_shapes(*(i.shape for i in given)))
    layout, mesh = common_layout(meshed, shape), meshed[0]._spec.mesh
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0
    local = to_parts(given, shape, layout, mesh, cause_of(aten.index.Tensor, given))
    return moved(layout, tuple(d + first for d in range(len(shape)))), local, first


@operator(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(func: Any, args: Any, kwargs: Any) -> Any:
    """`x[positions]`; one list of positions along a split dim leaves the result split there."""
    x, indices = args[0], _positions(args[0], args[1])
    if indices is None:
        return NotImplemented
    mapping, used = _mapping(x, indices)
    table = _lookup(x, indices, used)
    if table is not None:
        target, local, first = table
        places = iter(local)
        out = func(x._local_tensor if is_mesh(x) else x, [None if i is None else next(places) for i in indices])
        shape = torch.broadcast_shapes(*(indices[dim].shape for dim in used))
        whole = (*out.shape[:first], *shape, *out.shape[first + len(shape) :])
        meshed = mesh_tensors([x, *indices])
        return wrap(out, meshed[0]._spec.mesh, target, tuple(whole), ledger_of(meshed))
    if not is_mesh(x):
        return NotImplemented
    mesh, cause = x._spec.mesh, cause_of(func, args)
    there = aside(x, used, cause)
    if there is None:
        return NotImplemented
    out = func(there._local_tensor, [None if i is None else _whole(i, mesh, cause) for i in indices])
    local_shape, target = list(out.shape), moved(tuple(there._spec.placements), mapping)
    for axis, p in enumerate(there._spec.placements):
        if isinstance(p, Shard):
            local_shape[target[axis].dim] = x._spec.shape[p.dim]  # type: ignore[attr-defined]
    result = wrap(out, mesh, target, tuple(local_shape), x._ledger)
    same = there is not x and len(used) == 1 and indices[used[0]].ndim == 1
    return home(result, tuple(x._spec.placements), cause) if same else result


def _masked(x: Any, indices: Any, values: Any, accumulate: bool) -> Any:
    """Writing under a mask of the shape of `x` (or of some of its dims in a row): elementwise."""
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1 or indices[used[0]].dtype is not torch.bool or not is_mesh(x):
        return NotImplemented
    mask, at = indices[used[0]], used[0]
    if values.numel() == 1:
        behind = x.ndim - at - mask.ndim
        for _ in range(behind):
            mask = mask.unsqueeze(-1)
        value = values.reshape(())
        new = x + value if accumulate else value.to(x.dtype) if value.dtype != x.dtype else value
        return pointwise(aten.where.self, (mask, new, x), {})
    if mask.ndim == x.ndim and values.ndim == 1 and not accumulate:
        return masked_scatter(aten.masked_scatter.default, (x, mask, values), {})
    return NotImplemented


@operator(aten.masked_scatter.default)
def masked_scatter(func: Any, args: Any, kwargs: Any) -> Any:
    """The mask alone is made whole, to count the positions before each; `source` must not be split."""
    x, mask, source = args
    meshed = mesh_tensors(args)
    mesh, cause = meshed[0]._spec.mesh, cause_of(func, args)
    if not is_mesh(x) or (is_mesh(source) and splits(tuple(source._spec.placements))) or mask.shape != x.shape:
        return NotImplemented
    values = (source._local_tensor if is_mesh(source) else source).reshape(-1)
    chosen = _whole(mask, mesh, cause)
    order = (chosen.reshape(-1).cumsum(0) - 1).clamp(min=0).view(chosen.shape)
    target = tuple(x._spec.placements)
    here, which = cut(chosen, target, mesh), cut(order, target, mesh)
    local = x._local_tensor
    return like(torch.where(here, values[which], local) if values.numel() else local.clone(), x)


@operator(
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default
)
def index_put(func: Any, args: Any, kwargs: Any) -> Any:
    """Writing to positions, or adding there (which is the gradient of `index`)."""
    x, values = args[0], args[2]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    indices = _positions(x, args[1])
    if indices is None:
        return NotImplemented if mutable(func) else _masked(x, list(args[1]), values, accumulate)
    mapping, used = _mapping(x, indices)
    meshed = mesh_tensors([x, *indices, values])
    mesh, cause = meshed[0]._spec.mesh, cause_of(func, args)
    table = _lookup(x, indices, used)
    if table is not None:
        return _put_in_table(func, args, kwargs, table, accumulate) if not mutable(func) else NotImplemented
    wide = x.ndim - len(used) + max(i.ndim for i in indices if i is not None)
    if not is_mesh(x) or values.ndim not in (0, wide):
        return NotImplemented
    there = x if mutable(func) and whole_dims(x, used) else None if mutable(func) else aside(x, used, cause)
    if there is None:
        return NotImplemented
    target = moved(tuple(there._spec.placements), mapping)
    if values.ndim:
        target = tuple(REPLICATE if isinstance(p, Shard) and values.shape[p.dim] == 1 else p for p in target)
    else:
        target = replicated(mesh)
    local = placed(values, target, cause) if is_mesh(values) else cut(values, target, mesh)
    places = [None if i is None else _whole(i, mesh, cause) for i in indices]
    out = func(there._local_tensor, places, local, *args[3:], **kwargs)
    return x if mutable(func) else home(like(out, there), tuple(x._spec.placements), cause)


def _put_in_table(func: Any, args: Any, kwargs: Any, table: Any, accumulate: bool) -> Any:
    """Adding to a table that every rank holds, at positions that differ: the ranks' results are summands."""
    x, values = args[0], args[2]
    target, places, _ = table
    if not accumulate:
        return NotImplemented
    meshed = mesh_tensors([x, *args[1], values])
    mesh, cause = meshed[0]._spec.mesh, cause_of(func, args)
    shape = aten.index.Tensor(torch.empty(x.shape, device="meta"), [_meta(i) for i in args[1]]).shape
    if tuple(values.shape) != tuple(shape):
        return NotImplemented
    part = placed(values, target, cause) if is_mesh(values) else cut(values, target, mesh)
    axes = [axis for axis, _ in splits(target)]
    local = x._local_tensor if is_mesh(x) else x
    if any(coordinates(mesh)[axis] for axis in axes):  # what was there counts once
        local = torch.zeros_like(local)
    mine = iter(places)
    out = func(local, [None if i is None else next(mine) for i in args[1]], part, *args[3:], **kwargs)
    placements = tuple(PARTIAL if axis in axes else REPLICATE for axis in range(mesh.ndim))
    return wrap(out, mesh, placements, tuple(x.shape), ledger_of(meshed))


def _meta(index: Any) -> Any:
    return None if index is None else torch.empty(index.shape, dtype=index.dtype, device="meta")


@operator(
    aten.index_select.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_copy.default,
    aten.index_reduce.default,
)
def index_select(func: Any, args: Any, kwargs: Any) -> Any:
    """Positions of a dim, taken, filled, replaced or added to."""
    x, dim, positions = args[:3]
    if not is_mesh(x) or not x.ndim:
        return NotImplemented
    mesh, cause = x._spec.mesh, cause_of(func, args)
    there = x if whole_dims(x, dim) else None if mutable(func) else aside(x, dim, cause)
    if there is None:
        return NotImplemented
    target, rest = tuple(there._spec.placements), list(args[3:])
    if rest and isinstance(rest[0], torch.Tensor) and rest[0].ndim:
        rest[0] = placed(rest[0], target, cause) if is_mesh(rest[0]) else cut(rest[0], target, mesh)
    elif rest and is_mesh(rest[0]):
        rest[0] = _whole(rest[0], mesh, cause)
    out = func(there._local_tensor, dim, _whole(positions, mesh, cause), *rest, **kwargs)
    return x if mutable(func) else home(resized(out, there), tuple(x._spec.placements), cause)
