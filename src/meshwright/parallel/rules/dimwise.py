"""Operators that couple positions along named dims only: plain local work as long as those dims are whole.

Sorting, scans, gathers by index, transforms. Where the named dim is split they fall to the reported gather.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Shard

from meshwright.parallel.layout import Placements, moved, replicated, splits
from meshwright.parallel.operators import cause_of, mutable, operator, placed
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.tensor import is_mesh, like, wrap

aten = torch.ops.aten

# operator -> (position of the dim argument, its default)
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.cumsum.default: (1, None),
    aten.cumprod.default: (1, None),
    aten.logcumsumexp.default: (1, None),
    aten.sort.default: (1, -1),
    aten.sort.stable: (2, -1),
    aten.topk.default: (2, -1),
    aten.kthvalue.default: (2, -1),
    aten.median.dim: (1, None),
    aten.glu.default: (1, -1),
    aten._fft_c2c.default: (1, None),
    aten._fft_r2c.default: (1, None),
    aten._fft_c2r.default: (1, None),
}


def _free(x: Any, dims: Any) -> bool:
    """Whether no axis splits any of `dims`."""
    wanted = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return all(dim not in wanted for _, dim in splits(tuple(x._spec.placements)))


def _resized(local: torch.Tensor, x: Any) -> Any:
    """A local result whose split dims are those of `x`, with whatever size its whole dims have now."""
    placements, shape = tuple(x._spec.placements), list(local.shape)
    for _, dim in splits(placements):
        shape[dim] = x._spec.shape[dim]
    return wrap(local, x._spec.mesh, placements, tuple(shape), x._ledger)


@operator(*_ALONG)
def along(func: Any, args: Any, kwargs: Any) -> Any:
    """Scans, sorts and transforms along a dim; some drop it (median, kthvalue without keepdim)."""
    x = args[0]
    at, default = _ALONG[func]
    dims = kwargs.get("dim", args[at] if len(args) > at else default)
    if not _free(x, dims):
        return NotImplemented
    out = func(x._local_tensor, *args[1:], **kwargs)
    first = out[0] if isinstance(out, tuple) else out
    if first.ndim < x.ndim:
        gone = dims % x.ndim
        mapping = tuple(None if d == gone else d - (d > gone) for d in range(x.ndim))
        shape = tuple(size for d, size in enumerate(x._spec.shape) if d != gone)
        target = moved(tuple(x._spec.placements), mapping)
        return tuple(wrap(o, x._spec.mesh, target, shape, x._ledger) for o in out)
    return tuple(_resized(o, x) for o in out) if isinstance(out, tuple) else _resized(out, x)


@operator(aten.glu_backward.default)
def glu_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of `glu` along a whole dim."""
    grad, x, dim = args
    if not _free(x, dim):
        return NotImplemented
    local = placed(grad, tuple(x._spec.placements), cause_of(func, args))
    return like(func(local, x._local_tensor, dim), x)


@operator(aten.repeat.default)
def repeat(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies along whole dims."""
    x, times = args
    lead = len(times) - x.ndim
    placements = tuple(x._spec.placements)
    if any(times[lead + dim] != 1 for _, dim in splits(placements)):
        return NotImplemented
    target = moved(placements, tuple(dim + lead for dim in range(x.ndim)))
    shape = tuple(n * (1 if i < lead else x._spec.shape[i - lead]) for i, n in enumerate(times))
    return wrap(func(x._local_tensor, times), x._spec.mesh, target, shape, x._ledger)


@operator(aten.logsumexp.default)
def logsumexp(func: Any, args: Any, kwargs: Any) -> Any:
    """The stable form, from reductions that know split dims; its backward is elementwise."""
    x, dims = args[0], args[1]
    keepdim = args[2] if len(args) > 2 else False
    top = aten.amax.default(x, dims, True)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    out = aten.sum.dim_IntList((x - top).exp(), dims, True).log() + top
    return out if keepdim else aten.squeeze.dims(out, dims if isinstance(dims, list | tuple) else [dims])


def _index_local(index: Any, mesh: Any, cause: Any) -> Any:
    return placed(index, replicated(mesh), cause) if is_mesh(index) else index


def _indexed(x: Any, indices: Any) -> tuple[tuple[int | None, ...], list[int]] | None:
    """Where the whole dims of `x[indices]` go, and the dims that are indexed; None if a split dim is touched or
    an index is not a plain list of positions."""
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if not used or any(indices[dim].dtype not in (torch.int64, torch.int32) for dim in used) or not _free(x, used):
        return None
    wide = max(indices[dim].ndim for dim in used)
    together = used == list(range(used[0], used[-1] + 1))
    mapping: list[int | None] = []
    for dim in range(x.ndim):
        if dim in used:
            mapping.append(None)
            continue
        before = sum(1 for other in range(dim) if other not in used)
        mapping.append(before + (wide if not together or dim > used[0] else 0))
    return tuple(mapping), used


def _target(x: Any, mapping: tuple[int | None, ...]) -> Placements:
    return moved(tuple(x._spec.placements), mapping)


@operator(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(func: Any, args: Any, kwargs: Any) -> Any:
    """`x[:, [2, 0]]` where the indexed dims are whole."""
    x, indices = args[0], list(args[1])
    found = _indexed(x, indices) if is_mesh(x) else None
    if found is None:
        return NotImplemented
    mapping, _ = found
    mesh, cause = x._spec.mesh, cause_of(func, args)
    out = func(x._local_tensor, [None if i is None else _index_local(i, mesh, cause) for i in indices])
    shape, target = list(out.shape), _target(x, mapping)
    for axis, p in enumerate(x._spec.placements):
        if isinstance(p, Shard):
            shape[target[axis].dim] = x._spec.shape[p.dim]  # type: ignore[attr-defined]
    return wrap(out, mesh, target, tuple(shape), x._ledger)


@operator(
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default
)
def index_put(func: Any, args: Any, kwargs: Any) -> Any:
    """Writing to indexed whole dims."""
    x, indices, values = args[0], list(args[1]), args[2]
    found = _indexed(x, indices) if is_mesh(x) else None
    if found is None or values.ndim not in (0, x.ndim - len(found[1]) + max(i.ndim for i in indices if i is not None)):
        return NotImplemented
    mesh, cause = x._spec.mesh, cause_of(func, args)
    target = _target(x, found[0])
    if values.ndim == 0 or any(values.shape[dim] == 1 for _, dim in splits(target)):
        target = replicated(mesh)
    local = placed(values, target, cause) if is_mesh(values) else cut(values, target, mesh)
    places = [None if i is None else _index_local(i, mesh, cause) for i in indices]
    out = func(x._local_tensor, places, local, *args[3:], **kwargs)
    return x if mutable(func) else like(out, x)


@operator(aten.index_select.default, aten.index_add.default, aten.index_add_.default)
def index_select(func: Any, args: Any, kwargs: Any) -> Any:
    """Positions of a whole dim, taken or added to."""
    x, dim, index = args[:3]
    if not is_mesh(x) or not _free(x, dim):
        return NotImplemented
    mesh, cause = x._spec.mesh, cause_of(func, args)
    places = _index_local(index, mesh, cause)
    if func is aten.index_select.default:
        return _resized(func(x._local_tensor, dim, places), x)
    source, target = args[3], tuple(x._spec.placements)
    local = placed(source, target, cause) if is_mesh(source) else cut(source, target, mesh)
    out = func(x._local_tensor, dim, places, local, **kwargs)
    return x if mutable(func) else like(out, x)


@operator(
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.scatter_add_.default,
)
def gather_scatter(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise lookups along a whole dim; the other dims of all operands must agree where they are split."""
    x, dim, index = args[:3]
    reference = x if is_mesh(x) and splits(tuple(x._spec.placements)) else index
    if not is_mesh(reference) or not _free(reference, dim):
        return NotImplemented
    target, mesh, cause = tuple(reference._spec.placements), reference._spec.mesh, cause_of(func, args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(t.shape[d] != reference.shape[d] for t in tensors for _, d in splits(target)):
        return NotImplemented
    if mutable(func) and (not is_mesh(x) or tuple(x._spec.placements) != target):
        return NotImplemented

    def part(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return placed(value, target, cause) if is_mesh(value) else cut(value, target, mesh)

    out = func(*(part(a) for a in args), **kwargs)
    return x if mutable(func) else _resized(out, reference)
