"""`F.grid_sample` and `F.affine_grid` on split space, 2-D and 3-D.

The result is split over the output grid. Where points lie is data, so every rank computes which interval of each split
dim its own points read, tells the others (two numbers), and fetches that window: for a deformation that moves a voxel
by a few positions, little more than a halo. The window is laid into a volume of zeros of the full size and sampled by
torch's own operator, so coordinates, rounding and borders are its own to the bit; what no point reads is never looked
at. (So memory, unlike traffic, is that of the whole sample.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

from meshwright.parallel.comm import all_gather_stack, all_reduce
from meshwright.parallel.exchange import Line
from meshwright.parallel.functions import as_mesh, cause_for, function, gathered, mesh_of, placements_of
from meshwright.parallel.layout import REPLICATE, Placements, local_shape, split_axes, splits
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import redistribute
from meshwright.parallel.rules.windows import Space, fetch_windows, nothing
from meshwright.parallel.tensor import is_mesh
from meshwright.plan.geometry import Interval

_REACH = {"bilinear": 1, "nearest": 1, "bicubic": 2}  # positions that a point reads on either side of it


def _interval(grid: torch.Tensor, size: int, mode: str, padding: str, align_corners: bool) -> tuple[int, int]:
    """The positions of a dim of `size` that points with these normalised coordinates read; one to spare each side."""
    if not grid.numel():
        return size, 0
    low, high = (float(v) for v in grid.detach().double().aminmax())
    if not (abs(low) < 1e6 and abs(high) < 1e6):  # also not a number
        return 0, size
    if align_corners:
        low, high = (low + 1) / 2 * (size - 1), (high + 1) / 2 * (size - 1)
    else:
        low, high = ((low + 1) * size - 1) / 2, ((high + 1) * size - 1) / 2
    reach = _REACH[mode] + 1
    first, last = int(low // 1) - reach, int(-(-high // 1)) + reach + 1
    if padding == "border":
        first, last = min(max(first, 0), size - 1), min(max(last, 1), size)
    elif padding == "reflection" and (first < 0 or last > size):
        first, last = _reflected(first, last, size)
    return max(first, 0), min(last, size)


def _reflected(first: int, last: int, size: int) -> tuple[int, int]:
    """The positions inside that [first, last) reads when it is reflected at the borders (or half a voxel off)."""
    if last - first >= 2 * size or first < -size or last > 2 * size:
        return 0, size
    low, high = max(first, 0), min(last, size)
    if first < 0:
        low, high = max(0, min(low, -last - 1)), max(high, -first + 1)
    if last > size:
        low, high = min(low, 2 * size - last - 1), max(high, 2 * size - first + 1)
    return max(low, 0), min(high, size)


def _windows(space: Space, spans: Sequence[tuple[int, int]], line: Line) -> list[Interval]:
    """The windows of all ranks along `line`, from what this rank's points read of each dim. Ranks that differ along
    another split dim exchange the same extents, so they share the hull."""
    lo, hi = spans[line.dim - 2]
    table = torch.tensor([lo, -hi], device=space.mesh.device_type)
    others = [axis for axis, dim in splits(space.placements) if dim >= 2 and axis != line.axis]
    table = all_reduce(table, space.mesh, others, space.cause, "min")
    table = all_gather_stack(table, space.mesh, line.axis, space.cause)
    return [Interval(int(lo), max(int(lo), -int(hi))) for lo, hi in table]


def _layout(x: Any, grid: Any) -> Placements:
    """The splits of the result: the input's, and where it has none those of the grid (its dim d is dim d + 1 there)."""
    held: list[Any] = [p if isinstance(p, Shard) else REPLICATE for p in placements_of(x)]
    for axis, p in enumerate(placements_of(grid) if is_mesh(grid) else ()):
        if isinstance(p, Shard) and held[axis] == REPLICATE and p.dim < grid.ndim - 1:
            here = Shard(p.dim + (p.dim > 0))
            if here not in held:
                held[axis] = here
    return tuple(held)


def _refuse(input: Any, grid: Any, mode: str, padding: str) -> None:
    """Raise `ValueError` for what torch refuses too, on every rank alike."""
    n = input.ndim - 2
    if mode not in _REACH or (mode == "bicubic" and n != 2) or padding not in ("zeros", "border", "reflection"):
        raise ValueError(f"grid_sample: no mode={mode!r} with padding_mode={padding!r} for {n} dims")
    if n not in (2, 3) or grid.ndim != n + 2 or grid.shape[-1] != n or grid.shape[0] != input.shape[0]:
        raise ValueError(
            f"grid_sample: an input of shape {tuple(input.shape)} needs a grid of shape "
            f"({input.shape[0]}, {n} sizes, {n}), not {tuple(grid.shape)}"
        )


@function(F.grid_sample)
def grid_sample(
    input: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Any:
    """Values of `input` [N, C, *space] at the points of `grid` [N, *out, n] → [N, C, *out]."""
    _refuse(input, grid, mode, padding_mode)
    mesh, aligned = mesh_of(input, grid), bool(align_corners)
    x, grid = gathered(as_mesh(input, mesh), [1], "grid_sample"), as_mesh(grid, mesh)
    layout, cause = _layout(x, grid), cause_for("grid_sample", x, grid)
    held = tuple(p if p in (Shard(0), q) else REPLICATE for p, q in zip(layout, placements_of(x), strict=True))
    at = tuple(Shard(p.dim - (p.dim > 0)) if isinstance(p, Shard) else p for p in layout)
    points = to_local(redistribute(grid, at, cause))
    apart = tuple(axis for axis in split_axes(layout) if held[axis] == REPLICATE)  # the grid alone is split there
    local = to_local(redistribute(x, held, cause), apart)
    space = Space(mesh, held, tuple(x.shape), cause)
    spans = [
        _interval(points[..., -1 - i], size, mode, padding_mode, aligned) for i, size in enumerate(space.shape[2:])
    ]
    edges: list[int] = []
    for dim in range(2, x.ndim):
        line, window = space.line(dim), Interval(0, space.shape[dim])
        if line is not None:
            windows = _windows(space, spans, line)
            local = fetch_windows(local, space.shape[dim], windows, line)
            window = windows[line.me] if windows[line.me].size else Interval(0, 0)
        edges = [window.lo, space.shape[dim] - window.hi, *edges]
    out_shape = (*space.shape[:2], *grid.shape[1:-1])
    target = local_shape(mesh, layout, out_shape)
    if 0 in target:
        point = points.new_zeros((*(1 for _ in points.shape[:-1]), points.shape[-1])) + points.narrow(0, 0, 0).sum()
        y = nothing(local, target, lambda one: F.grid_sample(one, point, mode, padding_mode, aligned))
    else:
        y = F.grid_sample(F.pad(local, edges) if any(edges) else local, points, mode, padding_mode, aligned)
    return from_local(y, mesh, layout, out_shape, cause.ledger)


@function(F.affine_grid, torch.affine_grid_generator)
def affine_grid(theta: Any, size: Sequence[int], align_corners: bool | None = None) -> Any:
    """[N, n, n + 1] → [N, *space, n], split by samples where `theta` is."""
    mesh, cause = theta._spec.mesh, cause_for("affine_grid", theta)
    placements = tuple(p if p == Shard(0) else REPLICATE for p in placements_of(theta))
    local = to_local(redistribute(theta, placements, cause))
    shape = (int(size[0]), *(int(v) for v in size[2:]), len(size) - 2)
    if shape[0] != theta.shape[0]:
        raise RuntimeError(f"affine_grid: {theta.shape[0]} matrices for a size of {tuple(size)}")
    here = (local.shape[0], *shape[1:])
    if local.shape[0]:
        y = F.affine_grid(local, [local.shape[0], *size[1:]], bool(align_corners))
    else:
        y = nothing(local, here, lambda one: one)
    return from_local(y, mesh, placements, shape, cause.ledger)
