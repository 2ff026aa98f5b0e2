"""Slices and positions along a dim, and their gradients.

Of a split dim: output chunk -> input interval -> window exchange. The result is then a copy that
behaves as a view: what is written to it goes home to the base (`copies.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.account import layer
from meshwright.parallel.comm import Cause
from meshwright.parallel.copies import Copied, remember, writer
from meshwright.parallel.layout import axis_of, local_shape, moved, owned
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, operator, placed
from meshwright.parallel.rules.common import fetch_chunks, parts
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.tensor import is_mesh, wrap
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten


@operator(aten.slice.Tensor, linear=True)
def slice_(func: Any, args: Any, kwargs: Any) -> Any:
    """`x[start:end:step]` along one dim."""
    x = args[0]
    mesh, placements, shape = parts(x)
    dim = (args[1] if len(args) > 1 else 0) % len(shape)
    start, end, step = slice(*(args[2:4] + (None,) * (2 - len(args[2:4])))).indices(shape[dim])
    step = args[4] if len(args) > 4 else 1
    count = max(0, -(-(end - start) // step))
    new = (*shape[:dim], count, *shape[dim + 1 :])
    if axis_of(placements, dim) is None:
        return wrap(func(x._local_tensor, *args[1:]), mesh, placements, new, x._ledger)
    if count == shape[dim]:
        return wrap(aten.alias(x._local_tensor), mesh, placements, new, x._ledger)
    axis = axis_of(placements, dim)
    assert axis is not None
    wanted = tuple(
        Interval(start + c.lo * step, start + (c.hi - 1) * step + 1) if c.size else Interval(0, 0)
        for c in chunks(count, sizes(mesh)[axis])
    )
    local = fetch_chunks(x, x._local_tensor, dim, wanted, cause_of(func, args))
    if step > 1:
        local = aten.slice(local, dim, 0, None, step)
    out = wrap(local, mesh, placements, new, x._ledger, frozen_view=True)
    remember(out, aten.slice.Tensor, (x, dim, start, end, step), {})
    return out


@operator(aten.slice_backward.default)
def slice_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient put back into zeros of the input's size."""
    grad, shape, dim, start, end, step = args
    mesh, placements, _ = parts(grad)
    dim %= len(shape)
    start, _, _ = slice(start, end).indices(shape[dim])
    axis = axis_of(placements, dim)
    if axis is None:
        local = list(local_shape(mesh, placements, tuple(shape)))
        return wrap(func(grad._local_tensor, local, dim, *args[3:]), mesh, placements, tuple(shape), grad._ledger)
    out = grad._local_tensor.new_zeros(local_shape(mesh, placements, tuple(shape)))
    put_home(grad, out, dim, shape[dim], start, step, cause_of(func, args))
    return wrap(out, mesh, placements, tuple(shape), grad._ledger)


def put_home(piece: Any, local: torch.Tensor, dim: int, size: int, start: int, step: int, cause: Cause) -> None:
    """Write mesh tensor `piece`, the slice `[start::step]` of split dim `dim` of `size`, into this rank's part
    `local` of the whole. Each position is sent at most once."""
    mesh, placements, _ = parts(piece)
    axis = axis_of(placements, dim)
    assert axis is not None
    count = piece._spec.shape[dim]

    def positions(span: Interval) -> Interval:  # the indices of the slice whose positions lie in `span`
        lo = min(count, max(0, -(-(span.lo - start) // step)))
        return Interval(lo, max(lo, min(count, -(-(span.hi - start) // step))))

    wanted = tuple(positions(span) for span in chunks(size, sizes(mesh)[axis]))
    mine = fetch_chunks(piece, piece._local_tensor, dim, wanted, cause)
    span = owned(mesh, placements, dim, size)
    index = positions(span)
    if index.size:
        first = start + index.lo * step - span.lo
        aten.slice(local, dim, first, first + (index.size - 1) * step + 1, step).copy_(mine)


@writer(aten.slice.Tensor)
def write_slice(source: Copied, base: Any) -> None:
    """Each position goes to its owner."""
    dim, start, _, step = source.args
    cause = Cause(base._ledger, (layer(), "slice"))
    put_home(source.copy(), base._local_tensor, dim, base._spec.shape[dim], start, step, cause)


@operator(aten.select.int, linear=True)
def select(func: Any, args: Any, kwargs: Any) -> Any:
    """One position of a dim; of a split dim its owner gives it to all."""
    x, dim, index = args
    mesh, placements, shape = parts(x)
    dim %= len(shape)
    index = index % shape[dim] if -shape[dim] <= index < shape[dim] else index
    mapping = tuple(None if d == dim else d - (d > dim) for d in range(len(shape)))
    new = (*shape[:dim], *shape[dim + 1 :])
    axis = axis_of(placements, dim)
    if axis is None:
        out = func(x._local_tensor, dim, index)
        return wrap(out, mesh, moved(placements, mapping), new, x._ledger)
    if not 0 <= index < shape[dim]:
        raise IndexError(f"index {index} is out of bounds for dim {dim} with size {shape[dim]}")
    wanted = (Interval(index, index + 1),) * sizes(mesh)[axis]
    local = fetch_chunks(x, x._local_tensor, dim, wanted, cause_of(func, args))
    out = wrap(local.select(dim, 0), mesh, moved(placements, mapping), new, x._ledger, frozen_view=True)
    remember(out, aten.select.int, (x, dim, index), {})
    return out


@writer(aten.select.int)
def write_select(source: Copied, base: Any) -> None:
    """The owner of the position takes it over; nothing is sent."""
    mesh, placements, shape = parts(base)
    dim, index = source.args
    span = owned(mesh, placements, dim, shape[dim])
    if span.lo <= index < span.hi:
        base._local_tensor.select(dim, index - span.lo).copy_(source.local)


@operator(aten.select_backward.default)
def select_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient put back into zeros of the input's size; splits of the other dims stay."""
    grad, shape, dim, index = args
    mesh, placements, _ = parts(grad)
    dim %= len(shape)
    target = moved(placements, tuple(d + (d >= dim) for d in range(len(shape) - 1)))
    local = list(local_shape(mesh, target, tuple(shape)))
    return wrap(func(grad._local_tensor, local, dim, index), mesh, target, tuple(shape), grad._ledger)


@operator(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, linear=True)
def split(func: Any, args: Any, kwargs: Any) -> Any:
    """Pieces along a dim: each is a slice (or a position)."""
    x = args[0]
    shape = tuple(x._spec.shape)
    dim = (args[-1] if len(args) > (1 if func is aten.unbind.int else 2) else 0) % len(shape)
    if func is aten.unbind.int:
        return [select(aten.select.int, (x, dim, i), {}) for i in range(shape[dim])]
    widths = args[1]
    if isinstance(widths, int):
        widths = [min(widths, shape[dim] - lo) for lo in range(0, shape[dim], widths)] or [0]
    out, lo = [], 0
    for width in widths:
        out.append(slice_(aten.slice.Tensor, (x, dim, lo, lo + width), {}))
        lo += width
    return out


@operator(aten.slice_scatter.default, aten.select_scatter.default)
def slice_scatter(func: Any, args: Any, kwargs: Any) -> Any:
    """A copy with one slice (or position) replaced."""
    x, source = args[:2]
    if not is_mesh(x):
        return NotImplemented
    cause = cause_of(func, args)
    mesh, placements, shape = parts(x)
    whole = wrap(x._local_tensor.clone(), mesh, placements, shape, x._ledger)
    if func is aten.slice_scatter.default:
        named = dict(zip(("dim", "start", "end", "step"), args[2:], strict=False)) | kwargs
        dim, start, end, step = (named.get(key, default) for key, default in _SLICE)
        piece = slice_(aten.slice.Tensor, (whole, dim, start, end, step), {})
    else:
        piece = select(aten.select.int, (whole, *args[2:]), kwargs)
    target = tuple(piece._spec.placements)
    piece._local_tensor.copy_(placed(source, target, cause) if is_mesh(source) else cut(source, target, mesh))
    if piece._source is not None:
        piece._source.write(0)
    return whole


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))
