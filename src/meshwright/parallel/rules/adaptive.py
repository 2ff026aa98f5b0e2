"""Adaptive average and maximum pooling on split space, 1-D to 3-D.

Output o of m reads input [floor(o n / m), ceil((o + 1) n / m)). A split dim is handled in one of two ways, chosen by
the global shape alone: every rank fetches the windows of its outputs; or, where outputs are fewer than ranks and it
costs less, every rank pools what it has and the partial results are merged (then the result is whole on every rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.comm import all_gather_stack, all_reduce
from meshwright.parallel.exchange import Line
from meshwright.parallel.functions import function, placements_of
from meshwright.parallel.layout import REPLICATE, with_axis
from meshwright.parallel.node import Node
from meshwright.parallel.parts import from_local
from meshwright.parallel.redistribute import same
from meshwright.parallel.rules.windows import (
    Space,
    enter,
    fetch_windows,
    nothing,
    picked,
    raster,
    result_dtype,
    unravelled,
)
from meshwright.parallel.tensor import wrap
from meshwright.plan.geometry import Interval, chunks, transfers

_AVG: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_NEVER = 2**62  # a position after all others
_MAX: dict[int, Any] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def _bins(size: int, outputs: int, out: Interval) -> list[Interval]:
    """The input interval of each output."""
    return [Interval(o * size // outputs, -(-(o + 1) * size // outputs)) for o in range(out.lo, out.hi)]


@dataclass(frozen=True)
class _Dim:
    """One spatial dim of this rank's work: local part starts at global `base`, `bins` are relative to it."""

    dim: int
    base: int
    bins: tuple[Interval, ...]
    first: int  # the output that the first bin belongs to
    merged: Line | None  # the ranks whose partial results are merged

    def native(self, size: int) -> bool:
        """Whether the plain operator on the local part has just these bins."""
        return list(self.bins) == _bins(size, len(self.bins), Interval(0, len(self.bins)))


def _merge(space: Space, dim: int, outputs: Sequence[int], line: Line, average: bool) -> bool:
    """Whether partial results are merged; the same on all ranks, as it looks at global sizes only."""
    size, m, ranks = space.shape[dim], outputs[dim - 2], line.ranks
    if m == 1 or m >= ranks:
        return m == 1
    windows = tuple(_span(size, m, out) for out in chunks(m, ranks))
    moved = sum(t.span.size for t in transfers(chunks(size, ranks), windows) if t.source != t.target)
    inside = math.prod(space.shape[2:]) // size
    outside = math.prod(outputs) // m
    merged = (ranks - 1) * m * outside * (1 if average else 2 * ranks)  # backward of a merged result sends nothing
    return merged < moved * inside


def _span(size: int, m: int, out: Interval) -> Interval:
    return Interval(out.lo * size // m, -(-out.hi * size // m)) if out.size else Interval(0, 0)


def _prepare(
    space: Space, local: torch.Tensor, outputs: Sequence[int], average: bool
) -> tuple[torch.Tensor, list[_Dim]]:
    """The windows of the dims that are not merged, and what there is to do along each dim."""
    dims = []
    for i, m in enumerate(outputs):
        dim, size, line = i + 2, space.shape[i + 2], space.line(i + 2)
        if line is None:
            dims.append(_Dim(dim, 0, tuple(_bins(size, m, Interval(0, m))), 0, None))
            continue
        if _merge(space, dim, outputs, line, average):
            own = chunks(size, line.ranks)[line.me]
            cut = [(o, each.meet(own)) for o, each in enumerate(_bins(size, m, Interval(0, m)))]
            cut = [(o, each) for o, each in cut if each.size]
            bins = tuple(Interval(each.lo - own.lo, each.hi - own.lo) for _, each in cut)
            dims.append(_Dim(dim, own.lo, bins, cut[0][0] if cut else 0, line))
            continue
        outs = chunks(m, line.ranks)
        spans = [_span(size, m, out) for out in outs]
        local = fetch_windows(local, size, spans, line)
        base = spans[line.me].lo
        bins = tuple(Interval(b.lo - base, b.hi - base) for b in _bins(size, m, outs[line.me]))
        dims.append(_Dim(dim, base, bins, 0, None))
    return local, dims


def _placed(y: torch.Tensor, d: _Dim, outputs: int, value: float) -> torch.Tensor:
    """Partial results among all outputs of a merged dim; `value` where this rank has none."""
    before, after = d.first, outputs - d.first - len(d.bins)
    if not before and not after:
        return y
    return F.pad(y, [0, 0] * (y.ndim - 1 - d.dim) + [before, after], value=value)


class _Sum(Node):
    """The sum over ranks of partial results. All ranks hold the result, so all hold its gradient already."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, line: Line) -> torch.Tensor:
        ctx.line = line
        return all_reduce(local, line.mesh, [line.axis], line.cause) if local.numel() else local.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Copy.apply(grad, ctx.line), None


class _Copy(Node):
    """A replicated gradient that each rank goes on with in its own way: its own gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, line: Line) -> torch.Tensor:
        ctx.line = line
        return same(grad)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Sum.apply(grad, ctx.line), None


class _Picked(Node):
    """`y` where it is `mine`, else the value `best` of its owner along `lines`, who gets the gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, mine: torch.Tensor, best: torch.Tensor, lines: Sequence[Line]
    ) -> torch.Tensor:
        ctx.lines = lines
        ctx.save_for_backward(mine)
        return torch.where(mine, y, best)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (mine,) = ctx.saved_tensors
        for line in ctx.lines:
            grad = _Copy.apply(grad, line)
        return torch.where(mine, grad, 0), None, None, None


def _finish(space: Space, y: torch.Tensor, dims: Sequence[_Dim], outputs: Sequence[int]) -> Any:
    placements = space.placements
    for d in dims:
        if d.merged:
            placements = with_axis(placements, d.merged.axis, REPLICATE)
    return from_local(y, space.mesh, placements, (*space.shape[:2], *outputs), space.cause.ledger)


def _outputs(n: int, input: Any, output_size: Any) -> tuple[int, ...]:
    asked = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,)
    asked = asked * (n if len(asked) == 1 else 1)
    if len(asked) != n:
        raise RuntimeError(f"adaptive pooling: output_size {output_size} for {n} dims")
    sizes = tuple(input.shape[2:])
    outputs = tuple(size if m is None else int(m) for m, size in zip(asked, sizes, strict=True))
    if 0 in sizes or min(outputs) < 0:
        raise RuntimeError(f"adaptive pooling: from {tuple(input.shape)} to {outputs}: sizes must be positive")
    return outputs


def _means(n: int, local: torch.Tensor, sizes: Sequence[int], outputs: Sequence[int]) -> torch.Tensor:
    """The plain operator. To a single position it is a mean, whose gradient does not hang on the input; where that is
    so on this rank alone, it is made to, so that second gradients walk through the same graph on every rank."""
    y: torch.Tensor = _AVG[n](local, sizes)
    if max(sizes) == 1 < max(outputs):
        nil = local.narrow(0, 0, 0).sum()
        y = y + nil * nil
    return y


def adaptive_avg_pool(n: int, input: Any, output_size: Any) -> Any:
    """Means over bins; sums of a merged dim are taken in at least fp32."""
    if input.ndim == n + 1:
        return adaptive_avg_pool(n, input.unsqueeze(0), output_size).squeeze(0)
    outputs = _outputs(n, input, output_size)
    space, local = enter(input, "adaptive_avg_pool")
    local, dims = _prepare(space, local, outputs, True)
    dtype = result_dtype(local, lambda one: _AVG[n](one, 1))
    merged = [d for d in dims if d.merged]
    if merged and local.dtype in (torch.bfloat16, torch.float16):
        local = local.float()
    for d in merged:
        sums = [local.narrow(d.dim, b.lo, b.size).sum(d.dim, keepdim=True) for b in d.bins]
        local = torch.cat(sums, d.dim) if sums else local.narrow(d.dim, 0, 0)
        local = _placed(local, d, outputs[d.dim - 2], 0.0)
    for d in dims:
        if not d.merged and local.numel() and not d.native(local.shape[d.dim]) and d.bins:
            local = torch.cat([local.narrow(d.dim, b.lo, b.size).mean(d.dim, keepdim=True) for b in d.bins], d.dim)
    target = (*local.shape[:2], *(outputs[d.dim - 2] if d.merged else len(d.bins) for d in dims))
    if 0 in target:
        y = nothing(
            local, target, lambda one: _means(n, one.expand(1, 1, *(2,) * n), [min(m, 2) for m in outputs], outputs)
        )
    else:
        y = _means(n, local, target[2:], outputs)
    for d in merged:
        assert d.merged is not None
        y, m = _Sum.apply(y, d.merged), outputs[d.dim - 2]
        counts = [b.size for b in _bins(space.shape[d.dim], m, Interval(0, m))]
        y = y / torch.tensor(counts, dtype=y.dtype, device=y.device).view(-1, *(1 for _ in range(n + 1 - d.dim)))
    return _finish(space, y.to(dtype), dims, outputs)


def _expanded(local: torch.Tensor, d: _Dim) -> tuple[torch.Tensor, torch.Tensor]:
    """The local part with every bin as wide as the widest (its last position repeated), so that the plain operator
    has just these bins; and the global position of each entry. A repeated value comes after itself, so the first of
    equal values stays the first."""
    size = local.shape[d.dim]
    if d.native(size):
        return local, torch.arange(d.base, d.base + size, device=local.device)
    width = max(b.size for b in d.bins)
    table = torch.tensor([min(b.lo + j, b.hi - 1) for b in d.bins for j in range(width)], device=local.device)
    return picked(local, d.dim, table), table + d.base


def adaptive_max_pool(n: int, input: Any, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima over bins; the first of equal values in raster order gets the gradient, as in torch."""
    if input.ndim == n + 1:
        out = adaptive_max_pool(n, input.unsqueeze(0), output_size, return_indices)
        return (out[0].squeeze(0), out[1].squeeze(0)) if return_indices else out.squeeze(0)
    outputs = _outputs(n, input, output_size)
    space, local = enter(input, "adaptive_max_pool")
    local, dims = _prepare(space, local, outputs, False)
    here = (*local.shape[:2], *(len(d.bins) for d in dims))
    if 0 in here:
        y = nothing(local, here, lambda one: _MAX[n](one, 1))
        index = torch.empty(here, dtype=torch.int64, device=y.device)
    else:
        tables = []
        for d in dims:
            local, table = _expanded(local, d)
            tables.append(table)
        y, index = _MAX[n](local, here[2:], True)
        if return_indices or any(d.merged for d in dims):
            places = unravelled(index, local.shape[2:])
            index = raster([t[p] for t, p in zip(tables, places, strict=True)], space.shape[2:])
    for d in dims:
        if d.merged:
            y = _placed(y, d, outputs[d.dim - 2], -math.inf)
            index = _placed(index, d, outputs[d.dim - 2], _NEVER)
    lines = [d.merged for d in dims if d.merged]
    if lines:
        y, index = _greatest(y, index, lines)
    pooled = _finish(space, y, dims, outputs)
    if not return_indices:
        return pooled
    return pooled, wrap(index, space.mesh, placements_of(pooled), tuple(pooled.shape), space.cause.ledger)


def _greatest(y: torch.Tensor, index: torch.Tensor, lines: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest of the ranks' values, of equal ones that with the smallest position; its owner gets the gradient.
    And that position."""
    best, at = y.detach(), index
    for line in lines:
        if not best.numel():
            continue
        values = all_gather_stack(best, line.mesh, line.axis, line.cause)
        places = all_gather_stack(at, line.mesh, line.axis, line.cause)
        best = values.amax(0)
        equal = (values == best) | (values.isnan() & best.isnan())
        at = torch.where(equal, places, _NEVER).amin(0)
    return _Picked.apply(y, index == at, best, lines), at


def _with_indices(n: int, input: Any, output_size: Any, return_indices: bool = True) -> Any:
    """The forms that always return indices."""
    return adaptive_max_pool(n, input, output_size, True)


function(F.adaptive_avg_pool1d)(partial(adaptive_avg_pool, 1))
function(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)(partial(adaptive_avg_pool, 2))
function(F.adaptive_avg_pool3d, torch._C._nn.adaptive_avg_pool3d)(partial(adaptive_avg_pool, 3))
function(F.adaptive_max_pool1d)(partial(adaptive_max_pool, 1))
function(F.adaptive_max_pool2d)(partial(adaptive_max_pool, 2))
function(F.adaptive_max_pool3d)(partial(adaptive_max_pool, 3))
function(F.adaptive_max_pool1d_with_indices, torch.adaptive_max_pool1d)(partial(_with_indices, 1))
function(F.adaptive_max_pool2d_with_indices, torch._C._nn.adaptive_max_pool2d)(partial(_with_indices, 2))
function(F.adaptive_max_pool3d_with_indices, torch._C._nn.adaptive_max_pool3d)(partial(_with_indices, 3))
