"""Operators that rearrange: views, permutations, slices, concatenation, padding, flips.

A dim that stays whole on every rank is handled by the plain local operator (views stay views). A split dim is
handled by its interval arithmetic: output chunk -> input interval -> window exchange -> the plain local operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause
from meshwright.parallel.exchange import Fetch, Line, fetch
from meshwright.parallel.layout import Placements, axis_of, local_shape, moved, owned, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, fallback, operator, placed, reshard
from meshwright.parallel.rules.pointwise import common_layout, to_parts
from meshwright.parallel.tensor import is_mesh, wrap
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten


def _parts(x: Any) -> tuple[DeviceMesh, Placements, tuple[int, ...]]:
    return x._spec.mesh, tuple(x._spec.placements), tuple(x._spec.shape)


def _dims(dims: Sequence[int], ndim: int) -> list[int]:
    return [dim % ndim if ndim else 0 for dim in dims]


def fetch_chunks(x: Any, local: torch.Tensor, dim: int, wanted: tuple[Interval, ...], cause: Cause) -> torch.Tensor:
    """Below autograd: this rank's wanted interval of split dim `dim` of mesh tensor `x` (local part `local`)."""
    mesh, placements, shape = _parts(x)
    axis = axis_of(placements, dim)
    assert axis is not None
    return fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))


@operator(aten.permute.default, aten.transpose.int, aten.t.default, linear=True)
def permute(func: Any, args: Any, kwargs: Any) -> Any:
    """Renumbered dims; splits follow."""
    x = args[0]
    mesh, placements, shape = _parts(x)
    ndim = len(shape)
    if func is aten.permute.default:
        order = _dims(args[1], ndim)
    else:
        order = list(range(ndim))
        if ndim > 1:
            a, b = _dims(args[1:], ndim) if func is aten.transpose.int else (0, 1)
            order[a], order[b] = order[b], order[a]
    back: list[int | None] = [order.index(dim) for dim in range(ndim)]
    out = func(x._local_tensor, *args[1:])
    return wrap(out, mesh, moved(placements, tuple(back)), tuple(shape[d] for d in order), x._ledger)


@operator(aten.unsqueeze.default, linear=True)
def unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    """A new dim of size 1."""
    x, dim = args
    mesh, placements, shape = _parts(x)
    dim %= len(shape) + 1
    mapping = tuple(d + (d >= dim) for d in range(len(shape)))
    shape = (*shape[:dim], 1, *shape[dim:])
    return wrap(func(x._local_tensor, dim), mesh, moved(placements, mapping), shape, x._ledger)


@operator(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, linear=True)
def squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    """Dims of *global* size 1 vanish; a split one is made whole first."""
    x = args[0]
    shape = tuple(x._spec.shape)
    asked = range(len(shape)) if len(args) == 1 else ([args[1]] if isinstance(args[1], int) else args[1])
    gone = sorted({dim for dim in _dims(list(asked), len(shape)) if shape[dim] == 1})
    x = reshard(x, gone, cause_of(func, args))
    mesh, placements, shape = _parts(x)
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    mapping = tuple(kept.index(dim) if dim in kept else None for dim in range(len(shape)))
    out = aten.squeeze.dims(x._local_tensor, gone) if gone else aten.alias(x._local_tensor)
    return wrap(out, mesh, moved(placements, mapping), tuple(shape[d] for d in kept), x._ledger)


@operator(aten.expand.default, linear=True)
def expand(func: Any, args: Any, kwargs: Any) -> Any:
    """Dims of size 1 repeated without memory; the splits of the other dims stay."""
    x = args[0]
    lead = len(args[1]) - len(x._spec.shape)
    grows = {dim for dim, size in enumerate(x._spec.shape) if size == 1 and args[1][dim + lead] not in (-1, 1)}
    x = reshard(x, sorted(grows), cause_of(func, args))
    mesh, placements, shape = _parts(x)
    target = tuple(shape[dim - lead] if size == -1 else size for dim, size in enumerate(args[1]))
    new = moved(placements, tuple(dim + lead for dim in range(len(shape))))
    local = list(target)
    for _, dim in splits(new):
        local[dim] = x._local_tensor.shape[dim - lead]
    return wrap(x._local_tensor.expand(local), mesh, new, target, x._ledger)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new dims with equal products, in order: how a reshape falls apart."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = ([i], [j]) if i < len(old) and j < len(new) else (list(range(i, len(old))), list(range(j, len(new))))
        if not (i < len(old) and j < len(new)):
            groups.append((a, b))
            break
        i, j = i + 1, j + 1
        while math.prod(old[d] for d in a) != math.prod(new[d] for d in b):
            if math.prod(old[d] for d in a) < math.prod(new[d] for d in b):
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        groups.append((a, b))
    return groups


@operator(aten.view.default, aten._unsafe_view.default, aten.reshape.default, linear=True)
def view(func: Any, args: Any, kwargs: Any) -> Any:
    """A reshape. A split dim that leads its group keeps its split (re-chunked where chunks no longer line up);
    a split dim inside a flattened group is made whole first, since its parts would interleave."""
    x, cause = args[0], cause_of(func, args)
    shape = tuple(x._spec.shape)
    new = list(args[1])
    if -1 in new:
        known = math.prod(size for size in new if size != -1)
        new[new.index(-1)] = math.prod(shape) // known if known else 0
    mapping: list[int | None] = [None] * len(shape)
    inner: list[int] = []
    rechunk: list[tuple[int, int]] = []  # (old dim, new dim) whose chunks must be moved
    if 0 not in shape:
        for old_dims, new_dims in _groups(shape, tuple(new)):
            lead = next((d for d in old_dims if shape[d] != 1), old_dims[0] if old_dims else None)
            head = next((d for d in new_dims if new[d] != 1), new_dims[0] if new_dims else None)
            for dim in old_dims:
                if dim == lead and head is not None:
                    mapping[dim] = head
                    if shape[dim] != new[head]:
                        rechunk.append((dim, head))
                else:
                    inner.append(dim)
    split = {dim for _, dim in splits(tuple(x._spec.placements))}
    x = reshard(x, [dim for dim in inner if dim in split] if 0 not in shape else sorted(split), cause)
    mesh, placements, _ = _parts(x)
    local = x._local_tensor
    target = moved(placements, tuple(mapping))
    moved_dims = [(old, head) for old, head in rechunk if axis_of(placements, old) is not None]
    copied = False
    for old, head in moved_dims:
        axis = axis_of(placements, old)
        assert axis is not None
        ranks = sizes(mesh)[axis]
        # flat positions of the group: old chunk boundaries against the chunks of the new leading dim
        inner_old, inner_new = _inner(shape, tuple(new), old, head)
        have = tuple(Interval(c.lo * inner_old, c.hi * inner_old) for c in chunks(shape[old], ranks))
        want = tuple(Interval(c.lo * inner_new, c.hi * inner_new) for c in chunks(new[head], ranks))
        if have == want:
            continue
        copied = True
        local = _flat_exchange(x, local, old, inner_old, have, want, Line(mesh, axis, old, cause))
    out_shape = local_shape(mesh, target, tuple(new))
    if copied or func is not aten.view.default:
        out = local.reshape(out_shape)
    else:
        try:
            out = local.view(out_shape)
        except RuntimeError:
            if x is args[0] and not splits(placements):
                raise  # the message of one device
            out, copied = local.reshape(out_shape), True
    return wrap(out, mesh, target, tuple(new), x._ledger, frozen_view=copied or x is not args[0])


def _inner(old: tuple[int, ...], new: tuple[int, ...], dim: int, head: int) -> tuple[int, int]:
    """How many elements of its group one step of the leading old dim, and of the leading new dim, covers."""
    for old_dims, new_dims in _groups(old, new):
        if dim in old_dims:
            after_old = math.prod(old[d] for d in old_dims if d > dim)
            return after_old, math.prod(new[d] for d in new_dims if d > head)
    raise AssertionError(f"dim {dim} is in no group of {old} -> {new}")


def _flat_exchange(
    x: Any,
    local: torch.Tensor,
    dim: int,
    inner: int,
    have: tuple[Interval, ...],
    want: tuple[Interval, ...],
    line: Line,
) -> torch.Tensor:
    """Flatten `dim` with the dims of its group behind it (`inner` elements) and move to the wanted chunks."""
    ends, count = dim + 1, 1
    while count < inner:
        count *= local.shape[ends]
        ends += 1
    flat = local.reshape(*local.shape[:dim], local.shape[dim] * inner, *local.shape[ends:])
    return Fetch.apply(flat, have, want, line)


@operator(aten.slice.Tensor, linear=True)
def slice_(func: Any, args: Any, kwargs: Any) -> Any:
    """`x[start:end:step]` along one dim."""
    x = args[0]
    mesh, placements, shape = _parts(x)
    dim = (args[1] if len(args) > 1 else 0) % len(shape)
    start, end, step = slice(*(args[2:4] + (None,) * (2 - len(args[2:4])))).indices(shape[dim])
    step = args[4] if len(args) > 4 else 1
    count = max(0, -(-(end - start) // step))
    new = (*shape[:dim], count, *shape[dim + 1 :])
    if axis_of(placements, dim) is None:
        return wrap(func(x._local_tensor, *args[1:]), mesh, placements, new, x._ledger, frozen_view=_frozen(x))
    if count == shape[dim]:
        return wrap(aten.alias(x._local_tensor), mesh, placements, new, x._ledger, frozen_view=_frozen(x))
    axis = axis_of(placements, dim)
    assert axis is not None
    wanted = tuple(
        Interval(start + c.lo * step, start + (c.hi - 1) * step + 1) if c.size else Interval(0, 0)
        for c in chunks(count, sizes(mesh)[axis])
    )
    local = fetch_chunks(x, x._local_tensor, dim, wanted, cause_of(func, args))
    if step > 1:
        local = aten.slice(local, dim, 0, None, step)
    return wrap(local, mesh, placements, new, x._ledger, frozen_view=True)


def _frozen(x: Any) -> bool:
    return bool(getattr(x, "_frozen_view", False))


@operator(aten.slice_backward.default)
def slice_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient put back into zeros of the input's size."""
    grad, shape, dim, start, end, step = args
    mesh, placements, _ = _parts(grad)
    dim %= len(shape)
    start, _, _ = slice(start, end).indices(shape[dim])
    axis = axis_of(placements, dim)
    if axis is None:
        local = list(local_shape(mesh, placements, tuple(shape)))
        return wrap(func(grad._local_tensor, local, dim, *args[3:]), mesh, placements, tuple(shape), grad._ledger)
    spans = chunks(shape[dim], sizes(mesh)[axis])
    count = grad._spec.shape[dim]

    def positions(span: Interval) -> Interval:  # the indices of the slice whose positions lie in `span`
        lo = min(count, max(0, -(-(span.lo - start) // step)))
        return Interval(lo, max(lo, min(count, -(-(span.hi - start) // step))))

    wanted = tuple(positions(span) for span in spans)
    mine = fetch_chunks(grad, grad._local_tensor, dim, wanted, cause_of(func, args))
    span = owned(mesh, placements, dim, shape[dim])
    index = positions(span)
    out = mine.new_zeros(local_shape(mesh, placements, tuple(shape)))
    if index.size:
        first = start + index.lo * step - span.lo
        aten.slice(out, dim, first, first + (index.size - 1) * step + 1, step).copy_(mine)
    return wrap(out, mesh, placements, tuple(shape), grad._ledger)


@operator(aten.select.int, linear=True)
def select(func: Any, args: Any, kwargs: Any) -> Any:
    """One position of a dim; of a split dim its owner gives it to all."""
    x, dim, index = args
    mesh, placements, shape = _parts(x)
    dim %= len(shape)
    index = index % shape[dim] if -shape[dim] <= index < shape[dim] else index
    mapping = tuple(None if d == dim else d - (d > dim) for d in range(len(shape)))
    new = (*shape[:dim], *shape[dim + 1 :])
    axis = axis_of(placements, dim)
    if axis is None:
        out = func(x._local_tensor, dim, index)
        return wrap(out, mesh, moved(placements, mapping), new, x._ledger, frozen_view=_frozen(x))
    if not 0 <= index < shape[dim]:
        raise IndexError(f"index {index} is out of bounds for dim {dim} with size {shape[dim]}")
    wanted = (Interval(index, index + 1),) * sizes(mesh)[axis]
    local = fetch_chunks(x, x._local_tensor, dim, wanted, cause_of(func, args))
    return wrap(local.select(dim, 0), mesh, moved(placements, mapping), new, x._ledger, frozen_view=True)


@operator(aten.select_backward.default)
def select_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient put back into zeros of the input's size; splits of the other dims stay."""
    grad, shape, dim, index = args
    mesh, placements, _ = _parts(grad)
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
    mesh, placements, shape = _parts(x)
    dims = _dims(args[1], len(shape))
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
    mesh, placements, shape = _parts(x)
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
    for shift, dim in zip(shifts, _dims(dims, x.ndim), strict=True):
        size = x._spec.shape[dim]
        if axis_of(placements, dim) is None:
            mesh, _, shape = _parts(x)
            x = wrap(x._local_tensor.roll(shift, dim), mesh, placements, shape, x._ledger)
        elif size and shift % size:
            at = size - shift % size
            tail = slice_(aten.slice.Tensor, (x, dim, at, size), {})
            head = slice_(aten.slice.Tensor, (x, dim, 0, at), {})
            x = cat(aten.cat.default, ([tail, head], dim), {})
    return x
