"""Operators that couple positions along named dims only: sorts, order statistics, lookups by position.

Plain local work where those dims are whole. Where they are split, the splits move to other dims and back
(all-to-all, see `aside.py`); if there is no other dim, the reported gather.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from meshwright.parallel.comm import Cause, all_gather_stack
from meshwright.parallel.layout import PARTIAL, REPLICATE, axis_of, moved, splits
from meshwright.parallel.mesh import coordinates, sizes
from meshwright.parallel.operators import cause_of, mutable, operator, placed, reshard
from meshwright.parallel.rules.aside import aside, away, home, run_aside, whole_dims
from meshwright.parallel.rules.common import parts
from meshwright.parallel.rules.joins import cat
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.rules.reduce import arguments
from meshwright.parallel.tensor import is_mesh, ledger_of, like, wrap
from meshwright.plan.geometry import chunk, chunks

aten = torch.ops.aten

# operator -> (position of the dim argument, its default)
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.cumprod.default: (1, None),
    aten.sort.default: (1, -1),
    aten.sort.stable: (2, -1),
    aten.topk.default: (2, -1),  # of a whole dim
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


@operator(aten.topk.default)
def topk(func: Any, args: Any, kwargs: Any) -> Any:
    """Few of many: each rank sends its own best, of which the best are taken; many of few: all-to-all."""
    a = arguments(func, args, kwargs)
    x, k = a["self"], a["k"]
    mesh, placements, shape = parts(x)
    dim = a["dim"] % max(1, len(shape))
    axis = axis_of(placements, dim)
    if axis is None or not 0 < k <= shape[dim]:
        return along(func, (x, k, a["dim"], a["largest"], a["sorted"]), {})
    spans = chunks(shape[dim], sizes(mesh)[axis])
    most, cause = min(k, spans[0].size), cause_of(func, args)
    if most * len(spans) >= shape[dim] and away(placements, shape, frozenset([dim]), sizes(mesh)) is not None:
        return along(func, (x, k, dim, a["largest"], a["sorted"]), {})
    own = spans[coordinates(mesh)[axis]]
    values, places = x._local_tensor.topk(min(k, own.size), dim, a["largest"], sorted=False)
    places = places + own.lo
    missing = most - values.shape[dim]  # equal parts travel; what fills them up is dropped
    pads = [0, 0] * (len(shape) - 1 - dim) + [0, missing]
    stacks = [all_gather_stack(torch.nn.functional.pad(t, pads), mesh, axis, cause) for t in (values, places)]
    values, places = (
        torch.cat([part.narrow(dim, 0, min(k, span.size)) for part, span in zip(t, spans, strict=True)], dim)
        for t in stacks
    )
    values, which = values.topk(k, dim, a["largest"], a["sorted"])
    places = places.gather(dim, which)
    new = (*shape[:dim], k, *shape[dim + 1 :])
    mine = chunk(k, sizes(mesh)[axis], coordinates(mesh)[axis])
    return tuple(wrap(t.narrow(dim, mine.lo, mine.size), mesh, placements, new, x._ledger) for t in (values, places))


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
        small = reference is index or math.prod(reference.shape) <= math.prod(x.shape)
        if there is None and func is not aten.gather.default and reference is not x and small:
            there = reshard(reference, range(x.ndim), cause)  # as `x`, which every rank holds whole
        if there is None:
            return _looked_up(x, dim % x.ndim, index, uneven, cause) if func is aten.gather.default else NotImplemented
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


def _looked_up(x: Any, dim: int, index: Any, uneven: list[int], cause: Cause) -> Any:
    """Elements of a line that has nowhere else to be split: what is smaller travels, the positions or the line."""
    asked, held = math.prod(index.shape), math.prod(x.shape)
    if set(uneven) - {dim}:
        return NotImplemented
    if is_mesh(x) and asked <= held and x.dtype != torch.bool:
        return _answered(x, dim, index, cause)
    if not is_mesh(index) or held > asked:
        return NotImplemented
    mesh, placements, shape = parts(index)
    whole = tuple(REPLICATE if getattr(p, "dim", None) == dim else p for p in placements)
    line = placed(x, whole, cause) if is_mesh(x) else cut(x, whole, mesh)
    return wrap(line.gather(dim, index._local_tensor), mesh, placements, shape, ledger_of([x, index]))


def _answered(x: Any, dim: int, index: Any, cause: Cause) -> Any:
    """Few elements of a split line: every rank is asked for all, and the answers add up."""
    mesh, placements, shape = parts(x)
    axis = axis_of(placements, dim)
    if axis is None:
        return NotImplemented
    own = chunk(shape[dim], sizes(mesh)[axis], coordinates(mesh)[axis])
    whole = tuple(REPLICATE if a == axis else p for a, p in enumerate(placements))
    asked = placed(index, whole, cause) if is_mesh(index) else cut(index, whole, mesh)
    mine, somebodys = (asked >= own.lo) & (asked < own.hi), (asked >= 0) & (asked < shape[dim])
    held = x._local_tensor if own.size else x._local_tensor.new_zeros([n or 1 for n in x._local_tensor.shape])
    places = torch.where(somebodys, torch.where(mine, asked - own.lo, 0), asked)  # beyond `x`: torch's error
    answer = held.gather(dim, places).masked_fill(~mine, 0)
    summands = tuple(PARTIAL if a == axis else p for a, p in enumerate(placements))
    found = wrap(answer, mesh, summands, tuple(index.shape), x._ledger)
    return home(found, placements, cause)
