"""Views: permutations, reshapes, dims of size 1. Whole dims stay views; splits follow their dims."""

from __future__ import annotations

import math
from typing import Any

import torch

from meshwright.parallel.account import layer
from meshwright.parallel.comm import Cause
from meshwright.parallel.copies import Copied, writer
from meshwright.parallel.exchange import Fetch, Line
from meshwright.parallel.layout import axis_of, local_shape, moved, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, dispatch, operator, placed, reshard
from meshwright.parallel.rules.common import parts, positive
from meshwright.parallel.tensor import wrap
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten


@operator(aten.permute.default, aten.transpose.int, aten.t.default, linear=True)
def permute(func: Any, args: Any, kwargs: Any) -> Any:
    """Renumbered dims; splits follow."""
    x = args[0]
    mesh, placements, shape = parts(x)
    ndim = len(shape)
    if func is aten.permute.default:
        order = positive(args[1], ndim)
    else:
        order = list(range(ndim))
        if ndim > 1:
            a, b = positive(args[1:], ndim) if func is aten.transpose.int else (0, 1)
            order[a], order[b] = order[b], order[a]
    back: list[int | None] = [order.index(dim) for dim in range(ndim)]
    out = func(x._local_tensor, *args[1:])
    return wrap(out, mesh, moved(placements, tuple(back)), tuple(shape[d] for d in order), x._ledger)


@operator(aten.unsqueeze.default, linear=True)
def unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    """A new dim of size 1."""
    x, dim = args
    mesh, placements, shape = parts(x)
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
    gone = sorted({dim for dim in positive(list(asked), len(shape)) if shape[dim] == 1})
    x = reshard(x, gone, cause_of(func, args))
    mesh, placements, shape = parts(x)
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    mapping = tuple(kept.index(dim) if dim in kept else None for dim in range(len(shape)))
    out = aten.squeeze.dims(x._local_tensor, gone) if gone else aten.alias(x._local_tensor)
    out_shape = tuple(shape[d] for d in kept)
    return wrap(out, mesh, moved(placements, mapping), out_shape, x._ledger, frozen_view=x is not args[0])


@operator(aten.expand.default, linear=True)
def expand(func: Any, args: Any, kwargs: Any) -> Any:
    """Dims of size 1 repeated without memory; the splits of the other dims stay."""
    x = args[0]
    lead = len(args[1]) - len(x._spec.shape)
    grows = {dim for dim, size in enumerate(x._spec.shape) if size == 1 and args[1][dim + lead] not in (-1, 1)}
    x = reshard(x, sorted(grows), cause_of(func, args))
    mesh, placements, shape = parts(x)
    target = tuple(shape[dim - lead] if size == -1 else size for dim, size in enumerate(args[1]))
    new = moved(placements, tuple(dim + lead for dim in range(len(shape))))
    local = list(target)
    for _, dim in splits(new):
        local[dim] = x._local_tensor.shape[dim - lead]
    return wrap(x._local_tensor.expand(local), mesh, new, target, x._ledger, frozen_view=x is not args[0])


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
    mesh, placements, _ = parts(x)
    local = x._local_tensor
    target = moved(placements, tuple(mapping))
    moved_dims = [(old, head) for old, head in rechunk if axis_of(placements, old) is not None]
    copied = False
    for old, head in reversed(moved_dims):  # each flattens its group; the dims before it keep their place
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


@writer(aten.view.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def write_view(source: Copied, base: Any) -> None:
    """The same elements in the order of the base."""
    _, placements, shape = parts(base)
    cause = Cause(base._ledger, (layer(), "view"))
    back = view(aten.reshape.default, (source.copy(), shape), {})
    base._local_tensor.copy_(placed(back, placements, cause))


_IN_PLACE = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
}


@operator(*_IN_PLACE)
def view_in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """The shape of the handle itself changes, and its part and layout with it."""
    x = args[0]
    new: Any = dispatch(_IN_PLACE[func], args, kwargs)
    with torch._C._DisableTorchDispatch():  # the handle has no data of its own: this sets its sizes alone
        func(*args, **kwargs)
    x._local_tensor, x._spec = new._local_tensor, new._spec
    x._frozen_view, x._source = new._frozen_view, new._source
    return x
