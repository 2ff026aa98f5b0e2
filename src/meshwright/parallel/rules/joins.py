"""Concatenation, flips, padding and rolls: each rank fetches what its output chunk needs of each part."""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.exchange import Line, fetch
from meshwright.parallel.layout import axis_of, moved, owned, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, fallback, operator, placed
from meshwright.parallel.rules.common import parts, positive
from meshwright.parallel.rules.pointwise import common_layout, to_parts
from meshwright.parallel.rules.slices import slice_
from meshwright.parallel.tensor import is_mesh, like, wrap
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten


@operator(aten.cat.default)
def cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Concatenation; along a split dim each rank fetches what its output chunk needs of every part."""
    tensors = [t for t in args[0] if not (t.ndim == 1 and t.shape[0] == 0)]
    meshed = [t for t in tensors if is_mesh(t)]
    if not meshed:
        return fallback(func, args, kwargs)
    dim = (args[1] if len(args) > 1 else 0) % tensors[0].ndim
    cause = cause_of(func, args)
    mesh = meshed[0]._spec.mesh
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    # the layout of the operand with most splits serves all; along `dim` sizes differ, so it is compared without it
    target = max((tuple(t._spec.placements) for t in meshed), key=lambda p: len(splits(p)))
    axis = axis_of(target, dim)
    parts, lo = [], 0
    for t in tensors:
        size = t.shape[dim]
        if is_mesh(t):
            local = placed(t, target, cause)
        else:
            local = t
            for _, d in splits(target):
                own = owned(mesh, target, d, t.shape[d])
                local = local.narrow(d, own.lo, own.size)
        if axis is not None:
            wanted = tuple(
                Interval(c.lo - lo, c.hi - lo).meet(Interval(0, size)) for c in chunks(shape[dim], sizes(mesh)[axis])
            )
            local = fetch(local, size, wanted, Line(mesh, axis, dim, cause))
        parts.append(local)
        lo += size
    ledger = next((t._ledger for t in meshed if t._ledger is not None), None)
    return wrap(torch.cat(parts, dim), mesh, target, tuple(shape), ledger)


@operator(aten.stack.default)
def stack(func: Any, args: Any, kwargs: Any) -> Any:
    """A new dim; never split."""
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else 0) % (tensors[0].ndim + 1)
    meshed = [t for t in tensors if is_mesh(t)]
    target = common_layout(meshed, tuple(tensors[0].shape))
    mesh, cause = meshed[0]._spec.mesh, cause_of(func, args)
    parts = to_parts(list(tensors), tuple(tensors[0].shape), target, mesh, cause)
    mapping = tuple(d + (d >= dim) for d in range(tensors[0].ndim))
    shape = (*tensors[0].shape[:dim], len(tensors), *tensors[0].shape[dim:])
    ledger = next((t._ledger for t in meshed if t._ledger is not None), None)
    return wrap(torch.stack(parts, dim), mesh, moved(target, mapping), shape, ledger)


@operator(aten.flip.default)
def flip(func: Any, args: Any, kwargs: Any) -> Any:
    """Mirrored dims: a rank fetches the mirrored interval and turns it over."""
    x = args[0]
    mesh, placements, shape = parts(x)
    dims = positive(args[1], len(shape))
    local, cause = x._local_tensor, cause_of(func, args)
    for dim in dims:
        axis = axis_of(placements, dim)
        if axis is not None:
            wanted = tuple(
                Interval(shape[dim] - c.hi, shape[dim] - c.lo) for c in chunks(shape[dim], sizes(mesh)[axis])
            )
            local = fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))
    return wrap(local.flip(dims), mesh, placements, shape, x._ledger)


@operator(aten.constant_pad_nd.default)
def constant_pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Padding (or cutting, where negative) by a constant at the ends of dims."""
    x, pad = args[0], args[1]
    value = args[2] if len(args) > 2 else 0
    mesh, placements, shape = parts(x)
    local, cause = x._local_tensor, cause_of(func, args)
    new, here = list(shape), [0] * len(pad)
    pairs = [(pair, len(shape) - 1 - pair, pad[2 * pair], pad[2 * pair + 1]) for pair in range(len(pad) // 2)]
    for pair, dim, before, after in pairs:  # whole dims first: what is cut there need not travel
        new[dim] = shape[dim] + before + after
        if axis_of(placements, dim) is None:
            lo, hi = max(0, -before), max(0, -after)
            local = local.narrow(dim, lo, shape[dim] - lo - hi)
            here[2 * pair], here[2 * pair + 1] = max(0, before), max(0, after)
    for pair, dim, before, _ in pairs:
        axis = axis_of(placements, dim)
        if axis is None:
            continue
        inside = Interval(0, shape[dim])
        wanted = tuple(Interval(c.lo - before, c.hi - before).meet(inside) for c in chunks(new[dim], sizes(mesh)[axis]))
        local = fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))
        mine = owned(mesh, placements, dim, new[dim])
        got = Interval(mine.lo - before, mine.hi - before).meet(inside)
        here[2 * pair] = min(mine.size, max(0, before - mine.lo))
        here[2 * pair + 1] = mine.size - got.size - here[2 * pair]
    return wrap(func(local, here, value), mesh, placements, tuple(new), x._ledger)


@operator(aten.roll.default)
def roll(func: Any, args: Any, kwargs: Any) -> Any:
    """Cyclic shift; along a split dim it is two slices joined."""
    x = args[0]
    shifts = [args[1]] if isinstance(args[1], int) else list(args[1])
    dims = [] if len(args) < 3 else ([args[2]] if isinstance(args[2], int) else list(args[2]))
    placements = tuple(x._spec.placements)
    if not dims:
        return NotImplemented if splits(placements) else fallback(func, args, kwargs)
    for shift, dim in zip(shifts, positive(dims, x.ndim), strict=True):
        size = x._spec.shape[dim]
        if axis_of(placements, dim) is None:
            mesh, _, shape = parts(x)
            x = wrap(x._local_tensor.roll(shift, dim), mesh, placements, shape, x._ledger)
        elif size and shift % size:
            at = size - shift % size
            tail = slice_(aten.slice.Tensor, (x, dim, at, size), {})
            head = slice_(aten.slice.Tensor, (x, dim, 0, at), {})
            x = cat(aten.cat.default, ([tail, head], dim), {})
    return x if x is not args[0] else like(x._local_tensor.clone(), x)  # a shift by nothing is still a copy
