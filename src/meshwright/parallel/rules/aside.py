"""All-to-all: a tensor whose split must leave some dims for a moment, and comes home after.

An operator that couples positions along split dims (a sort, a transform) runs on a tensor whose splits were moved to
dims that it does not couple. Each rank sends what it holds but its own share, once there and once back, and never
holds more than a share of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch.distributed.tensor import Shard

from meshwright.parallel.comm import Cause
from meshwright.parallel.layout import REPLICATE, Placements, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, placed
from meshwright.parallel.tensor import is_mesh, wrap


@lru_cache(maxsize=16384)
def away(
    placements: Placements, shape: tuple[int, ...], dims: frozenset[int], ranks: tuple[int, ...]
) -> Placements | None:
    """The placements with the splits of `dims` moved to the free dims that they cut most evenly; None if too few."""
    out = list(placements)
    taken = {dim for _, dim in splits(placements)} | dims
    for axis, dim in splits(placements):
        if dim not in dims:
            continue
        if ranks[axis] == 1:
            out[axis] = REPLICATE
            continue
        free = [d for d in range(len(shape)) if d not in taken and shape[d] > 1]
        if not free:
            return None
        best = min(free, key=lambda d: (-(-shape[d] // ranks[axis]) / shape[d], -shape[d]))
        out[axis] = Shard(best)
        taken.add(best)
    return tuple(out)


def whole_dims(x: Any, dims: Any) -> bool:
    """Whether no axis splits any of `dims`."""
    ndim = max(1, len(x._spec.shape))
    wanted = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return all(dim not in wanted for _, dim in splits(tuple(x._spec.placements)))


def aside(x: Any, dims: Any, cause: Cause, keep: Sequence[int] = ()) -> Any:
    """`x` with `dims` whole and its splits elsewhere (not in `keep`); `x` itself if they are, None if impossible."""
    spec = x._spec
    shape, placements = tuple(spec.shape), tuple(spec.placements)
    wanted = frozenset(dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims))
    if all(dim not in wanted for _, dim in splits(placements)):
        return x
    hidden = tuple(1 if dim in keep else size for dim, size in enumerate(shape))
    target = away(placements, hidden, wanted, sizes(spec.mesh))
    if target is None:
        return None
    return wrap(placed(x, target, cause), spec.mesh, target, shape, x._ledger)


def home(result: Any, placements: Placements, cause: Cause) -> Any:
    """The result (or each of several) placed as the input was."""
    if isinstance(result, list | tuple):
        return type(result)(home(item, placements, cause) for item in result)
    if not is_mesh(result) or tuple(result._spec.placements) == placements:
        return result
    spec = result._spec
    return wrap(placed(result, placements, cause), spec.mesh, placements, tuple(spec.shape), result._ledger)


def run_aside(rule: Callable[..., Any], dims: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """`rule` on the first argument put aside, its results brought home where they still have all dims."""
    x, cause = args[0], cause_of(func, args)
    moved = aside(x, dims, cause)
    if moved is None:
        return NotImplemented
    out = rule(func, (moved, *args[1:]), kwargs)
    first = out[0] if isinstance(out, list | tuple) else out
    same = is_mesh(first) and len(first._spec.shape) == len(x._spec.shape)
    return home(out, tuple(x._spec.placements), cause) if same else out
