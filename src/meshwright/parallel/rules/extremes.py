"""Largest and smallest, with and without their positions: each rank's own, then one small exchange of the best."""

from __future__ import annotations

import math
from typing import Any

import torch

from meshwright.parallel.comm import all_gather_stack
from meshwright.parallel.layout import owned
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.rules.reduce import Reduction, arguments, extreme_over_ranks, highest, lowest

aten = torch.ops.aten
_NOWHERE = torch.iinfo(torch.int64).max


@operator(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def extreme(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest (smallest) of the ranks' own."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a.get("dim"), a.get("keepdim", False))
    if not r.axes:
        return r.done(func(r.local, *args[1:], **kwargs))
    largest = func in (aten.amax.default, aten.max.default)
    if r.empty_here():
        local = r.local.new_full(r.local_out_shape(), (lowest if largest else highest)(r.local.dtype))
    else:
        local = (torch.amax if largest else torch.amin)(r.local, r.dims, keepdim=a.get("keepdim", False))
    return r.done(extreme_over_ranks(local, r.mesh, r.axes, cause_of(func, args), largest))


@operator(aten.aminmax.default)
def aminmax(func: Any, args: Any, kwargs: Any) -> Any:
    """Both."""
    a = arguments(func, args, kwargs)
    dims = [] if a["dim"] is None else [a["dim"]]
    return tuple(extreme(op, (a["self"], dims, a["keepdim"]), {}) for op in (aten.amin.default, aten.amax.default))


def _best(values: torch.Tensor, places: torch.Tensor, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The best over the ranks (dim 0), and the first position that has it; NaN is better than any number."""
    best = (torch.amax if largest else torch.amin)(values, 0)
    hit = (values == best) | values.isnan() if values.is_floating_point() else values == best
    return best, places.masked_fill(~hit, _NOWHERE).amin(0)


@operator(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)
def extreme_position(func: Any, args: Any, kwargs: Any) -> Any:
    """Values and global positions; among equals the first position, as on one device."""
    a = arguments(func, args, kwargs)
    dim, keepdim = a["dim"], a["keepdim"]
    r = Reduction(a["self"], dim, keepdim)
    pair = func in (aten.max.dim, aten.min.dim)
    if not r.axes:
        out = func(r.local, *args[1:], **kwargs)
        return tuple(r.done(o) for o in out) if pair else r.done(out)
    largest = func in (aten.max.dim, aten.argmax.default)
    worst, cause = (lowest if largest else highest)(r.local.dtype), cause_of(func, args)
    if dim is None:
        values, places = _first_of_all(r, worst, largest)
    elif r.empty_here():
        (dim,) = r.dims
        shape = [1 if d == dim else size for d, size in enumerate(r.local.shape)]
        values, places = r.local.new_full(shape, worst), torch.full(shape, _NOWHERE, device=r.local.device)
    else:
        (dim,) = r.dims
        values, places = (torch.max if largest else torch.min)(r.local, dim, keepdim=True)
        places = places + owned(r.mesh, r.placements, dim, r.shape[dim]).lo
    for axis in r.axes:
        found = all_gather_stack(values, r.mesh, axis, cause)
        values, places = _best(found, all_gather_stack(places, r.mesh, axis, cause), largest)
    if dim is None:
        return r.done(places.reshape(r.out_shape))
    if not keepdim:
        values, places = values.squeeze(dim), places.squeeze(dim)
    return (r.done(values), r.done(places)) if pair else r.done(places)


def _first_of_all(r: Reduction, worst: Any, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of this rank's part, and its position in the whole tensor laid out in rows."""
    if not r.local.numel():
        return r.local.new_full((), worst), torch.tensor(_NOWHERE, device=r.local.device)
    at = (torch.argmax if largest else torch.argmin)(r.local)
    place, rest = torch.zeros_like(at), at
    for dim in reversed(range(len(r.shape))):
        here = rest % r.local.shape[dim] + owned(r.mesh, r.placements, dim, r.shape[dim]).lo
        place = place + here * math.prod(r.shape[dim + 1 :])
        rest = rest // r.local.shape[dim]
    return r.local.reshape(-1)[at], place
