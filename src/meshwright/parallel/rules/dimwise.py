"""Operators that couple positions along named dims only: sorts, order statistics, lookups by position.

Plain local work where those dims are whole. Where they are split, the splits move to other dims and back
(all-to-all, see `aside.py`); if there is no other dim, the reported gather.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.layout import moved, splits
from meshwright.parallel.operators import cause_of, mutable, operator, placed
from meshwright.parallel.rules.aside import aside, home, run_aside, whole_dims
from meshwright.parallel.rules.joins import cat
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.tensor import is_mesh, like, wrap

aten = torch.ops.aten

# operator -> (position of the dim argument, its default)
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.cumprod.default: (1, None),
    aten.sort.default: (1, -1),
    aten.sort.stable: (2, -1),
    aten.topk.default: (2, -1),
    aten.kthvalue.default: (2, -1),
    aten.median.dim: (1, None),
    aten.nanmedian.dim: (1, None),
    aten.mode.default: (1, -1),
    aten.glu.default: (1, -1),
}


def resized(local: torch.Tensor, x: Any) -> Any:
    """A local result whose split dims are those of `x`, with whatever size its whole dims have now."""
    placements, shape = tuple(x._spec.placements), list(local.shape)
    for _, dim in splits(placements):
        shape[dim] = x._spec.shape[dim]
    return wrap(local, x._spec.mesh, placements, tuple(shape), x._ledger)


@operator(*_ALONG)
def along(func: Any, args: Any, kwargs: Any) -> Any:
    """Scans and sorts along a dim; some drop it (median, kthvalue without keepdim)."""
    x = args[0]
    at, default = _ALONG.get(func, (1, None))
    dim = kwargs.get("dim", args[at] if len(args) > at else default)
    if not whole_dims(x, dim):
        return run_aside(along, dim, func, args, kwargs)
    out = func(x._local_tensor, *args[1:], **kwargs)
    first = out[0] if isinstance(out, tuple) else out
    if first.ndim < x.ndim:
        gone = dim % x.ndim
        mapping = tuple(None if d == gone else d - (d > gone) for d in range(x.ndim))
        shape = tuple(size for d, size in enumerate(x._spec.shape) if d != gone)
        target = moved(tuple(x._spec.placements), mapping)
        return tuple(wrap(o, x._spec.mesh, target, shape, x._ledger) for o in out)
    return tuple(resized(o, x) for o in out) if isinstance(out, tuple) else resized(out, x)


@operator(aten.glu_backward.default)
def glu_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of `glu`."""
    grad, x, dim = args
    cause = cause_of(func, args)
    there = aside(x, dim, cause)
    if there is None:
        return NotImplemented
    target = tuple(there._spec.placements)
    local = placed(grad, target, cause) if is_mesh(grad) else cut(grad, target, there._spec.mesh)
    return home(like(func(local, there._local_tensor, dim), there), tuple(x._spec.placements), cause)


@operator(aten.repeat.default)
def repeat(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies along dims; along a split one each rank fetches what its output chunk repeats."""
    x, times = args
    lead = len(times) - x.ndim
    placements, times = tuple(x._spec.placements), list(times)
    for _, dim in splits(placements):
        if times[lead + dim] > 1:
            x, times[lead + dim] = cat(aten.cat.default, ([x] * times[lead + dim], dim), {}), 1
        elif not times[lead + dim]:
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


@operator(
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.scatter_add_.default,
)
def gather_scatter(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise lookups along a dim; the other dims of all operands must agree where they are split."""
    x, dim, index = args[:3]
    split = [t for t in (x, index, *args[3:]) if is_mesh(t) and splits(tuple(t._spec.placements))]
    if not split or not x.ndim:
        return NotImplemented
    reference, cause = split[0], cause_of(func, args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    uneven = [d for d in range(reference.ndim) if any(t.shape[d] != reference.shape[d] for t in tensors)]
    if whole_dims(reference, [dim, *uneven]):
        there = reference
    elif mutable(func):
        return NotImplemented
    else:
        there = aside(reference, {dim % x.ndim, *uneven}, cause)
        if there is None:
            return NotImplemented
    target, mesh = tuple(there._spec.placements), reference._spec.mesh
    if mutable(func) and (not is_mesh(x) or tuple(x._spec.placements) != target):
        return NotImplemented

    def part(value: Any) -> Any:
        if value is reference:
            return there._local_tensor
        if not isinstance(value, torch.Tensor):
            return value
        return placed(value, target, cause) if is_mesh(value) else cut(value, target, mesh)

    out = func(*(part(a) for a in args), **kwargs)
    return x if mutable(func) else home(resized(out, there), tuple(reference._spec.placements), cause)
