"""`F.max_unpool1d/2d/3d` on split space, with the global raster positions that max pooling returns.

Which values land in a rank's part depends on the indices, so every rank first tells, for each plane of its values,
the range of output planes that they land in (two numbers a plane). Then each fetches the planes that reach its part
and places them with the plain operator. Indices of max pooling lie near their values: little more than a halo moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.comm import all_gather_dim, all_reduce
from meshwright.parallel.exchange import Line
from meshwright.parallel.functions import as_mesh, function, gathered, mesh_of, placements_of
from meshwright.parallel.layout import owned, split_axes, splits
from meshwright.parallel.parts import to_local
from meshwright.parallel.redistribute import redistribute
from meshwright.parallel.rules.windows import Space, enter, fetch_windows, raster, unravelled
from meshwright.plan.geometry import Interval, chunks

_UNPOOL: dict[int, Any] = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}


@lru_cache(maxsize=1024)
def _shape(n: int, shape: tuple[int, ...], args: tuple[Any, ...]) -> tuple[int, ...]:
    """The global output shape by torch itself, of a tensor without channels; wrong sizes raise torch's own error."""
    one = torch.zeros((1, 1, *shape[2:]))
    return (*shape[:2], *_UNPOOL[n](one, one.long(), *args).shape[2:])


def _reached(places: torch.Tensor, dim: int, space: Space, size: int, line: Line) -> list[tuple[int, int]]:
    """For each plane of values along `dim`, the range of positions along it that they land in; equal on all ranks.

    Raises `RuntimeError` on every rank if an index lies outside.
    """
    rest = [d for d in range(places.ndim) if d != dim]
    if places.numel():
        table = torch.stack([places.amin(rest), -places.amax(rest)])
    else:
        table = places.new_full((2, places.shape[dim]), size)  # no values: an empty range
        table[1] = 1
    others = [axis for axis in split_axes(space.placements) if axis != line.axis]
    table = all_reduce(table, space.mesh, others, space.cause, "min")
    table = all_gather_dim(table, space.mesh, line.axis, 1, space.shape[dim], space.cause)
    ranges = [(int(lo), -int(hi)) for lo, hi in table.t()]
    if any(lo < 0 or hi >= size for lo, hi in ranges if lo <= hi):
        raise RuntimeError(f"max_unpool: an index lies outside the output, whose size along dim {dim} is {size}")
    return ranges


def _wanted(ranges: Sequence[tuple[int, int]], out: Interval) -> Interval:
    """The planes whose values may land in `out`."""
    hit = [plane for plane, (lo, hi) in enumerate(ranges) if lo < out.hi and hi >= out.lo and lo <= hi]
    return Interval(hit[0], hit[-1] + 1) if hit else Interval(0, 0)


def max_unpool(
    n: int,
    input: Any,
    indices: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
) -> Any:
    """Values at their positions, zeros elsewhere; of values with one position the last stays, as in torch."""
    if input.ndim == n + 1:
        size = output_size if output_size is None else tuple(output_size)[-n:]
        x, where = input.unsqueeze(0), indices.unsqueeze(0)
        return max_unpool(n, x, where, kernel_size, stride, padding, size).squeeze(0)
    mesh = mesh_of(input, indices)
    input, indices = as_mesh(input, mesh), as_mesh(indices, mesh)
    if tuple(input.shape) != tuple(indices.shape):
        raise RuntimeError(f"max_unpool: indices of shape {tuple(indices.shape)} for values {tuple(input.shape)}")
    if not splits(placements_of(input)):
        input = redistribute(input, placements_of(indices))
    size = None if output_size is None else tuple(int(v) for v in output_size)
    fixed = tuple(tuple(v) if isinstance(v, Sequence) else v for v in (kernel_size, stride, padding))
    out_shape = _shape(n, tuple(input.shape), (*fixed, size[-n:] if size else None))
    input = gathered(input, [1], "max_unpool")
    space, local = enter(input, "max_unpool")
    index = to_local(redistribute(indices, space.placements, space.cause))
    spatial, part = out_shape[2:], space.local_shape(out_shape)
    for dim in range(2, n + 2):  # all values that land here, dim by dim
        line = space.line(dim)
        if line is None:
            continue
        at = unravelled(index, spatial)[dim - 2].masked_fill((index < 0) | (index >= math.prod(spatial)), -1)
        ranges = _reached(at, dim, space, out_shape[dim], line)
        windows = [_wanted(ranges, out) for out in chunks(out_shape[dim], line.ranks)]
        local = fetch_windows(local, space.shape[dim], windows, line)
        index = fetch_windows(index, space.shape[dim], windows, line)
    index = _here(index, space, spatial)
    count = math.prod(part[2:])
    flat = local.reshape(*part[:2], -1, 1), index.reshape(*part[:2], -1, 1)
    if 0 in part[:2] or not flat[0].shape[2]:
        y = local.sum() * 0 + local.new_zeros(part)
    else:
        y = torch.ops.aten.max_unpool2d(*flat, [count + 1, 1])[:, :, :count].reshape(part)
    return space.done(y, out_shape)


def _here(index: torch.Tensor, space: Space, spatial: Sequence[int]) -> torch.Tensor:
    """Global raster positions as those in this rank's part; what lies elsewhere gets the position after the last."""
    inside: torch.Tensor | None = None
    places, sizes = unravelled(index, spatial), []
    for i, size in enumerate(spatial):
        own = owned(space.mesh, space.placements, i + 2, size)
        sizes.append(own.size)
        if own.size != size:
            hit = (places[i] >= own.lo) & (places[i] < own.hi)
            inside = hit if inside is None else inside & hit
            places[i] = places[i] - own.lo
    at = raster(places, sizes)
    return at if inside is None else torch.where(inside, at, math.prod(sizes))


function(F.max_unpool1d)(partial(max_unpool, 1))
function(F.max_unpool2d)(partial(max_unpool, 2))
function(F.max_unpool3d)(partial(max_unpool, 3))
