"""Maximum pooling along one split dim, without laying the neighbours' planes next to the part.

Few windows read beyond a cut. All of a rank's are pooled on its part alone first, as if nothing lay beyond, while the
planes travel; then those few again, on a strip of planes and the positions next to them. So nothing but strips is
copied. What travels is what a window of the whole would need; its gradient, where that is to be differentiated, is
that of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from meshwright.cluster.process_group import when_leaving
from meshwright.parallel.comm import dense_strides
from meshwright.parallel.exchange import Intervals, Line, Posted
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.node import Node
from meshwright.parallel.rules.grids import Grid
from meshwright.parallel.rules.windows import Space
from meshwright.plan.geometry import Interval, chunks

MOST_EDGES = 4  # windows near a cut: of more, a strip is no longer thin
_aten = torch.ops.aten
_POOL: dict[int, Any] = {
    2: _aten.max_pool2d_with_indices.default,
    3: _aten.max_pool3d_with_indices.default,
}
_BACKWARD: dict[int, Any] = {
    2: _aten.max_pool2d_with_indices_backward.default,
    3: _aten.max_pool3d_with_indices_backward.default,
}


class Edge(NamedTuple):
    """Windows of this rank that read planes of others: `outs` and what they read, counted from the first of the rank's
    outputs and from the first position of its part."""

    outs: Interval
    reads: Interval


class Work(NamedTuple):
    """A pooling of this rank's part. `edges` along the line's dim: near the cut before the part, and behind it."""

    line: Line
    owned: Intervals
    wanted: Intervals
    grids: tuple[Grid, ...]
    pads: tuple[int, ...]
    edges: tuple[Edge, ...]

    def pool(self, x: torch.Tensor, pads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and indices of all windows on `x`."""
        y, index = _POOL[len(pads)](x, *self._constants(pads))
        return y, index

    def back(self, grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor, pads: Sequence[int]) -> torch.Tensor:
        """The gradient of `x`."""
        order = memory_format(x)
        out: torch.Tensor = _BACKWARD[len(pads)](
            grad.contiguous(memory_format=order), x, *self._constants(pads), index.contiguous(memory_format=order)
        )
        return out

    def _constants(self, pads: Sequence[int]) -> tuple[Any, ...]:
        kernel, stride, _, dilation = zip(*((g.k, g.s, g.p, g.d) for g in self.grids), strict=True)
        return kernel, stride, list(pads), dilation, False

    def strip_pads(self) -> tuple[int, ...]:
        """Nothing but positions lies before and behind a strip."""
        return tuple(0 if i == self.line.dim - 2 else pad for i, pad in enumerate(self.pads))


def edge_work(space: Space, out_shape: Sequence[int], grids: Sequence[Grid]) -> Work | None:
    """The work of this rank, if one dim alone needs other ranks, and on all of them the windows near a cut are few and
    the others those that torch's operator has on the part alone. The same answer on all ranks."""
    lines = tuple(line if line and line.ranks > 1 else None for line in (space.line(i + 2) for i in range(len(grids))))
    return _planned(space.shape[2:], tuple(out_shape[2:]), tuple(grids), lines)


@lru_cache(maxsize=1024)
def _planned(
    sizes: tuple[int, ...], out_sizes: tuple[int, ...], grids: tuple[Grid, ...], lines: tuple[Line | None, ...]
) -> Work | None:
    far = None
    for i, (size, out_size, grid, line) in enumerate(zip(sizes, out_sizes, grids, lines, strict=True)):
        parts, outs = (chunks(count, line.ranks if line else 1) for count in (size, out_size))
        if all(_is_alone(grid, size, part, out) for part, out in zip(parts, outs, strict=True)):
            continue
        if far is not None or line is None:
            return None
        far = i, line, parts, outs
    if far is None or len(grids) not in _POOL:
        return None
    dim, line, parts, outs = far
    found = _edges(grids[dim], sizes[dim], outs)
    if found is None:
        return None
    pad, edges = found[line.me]
    pads = tuple(pad if i == dim else (0 if other else grids[i].p) for i, other in enumerate(lines))
    wanted = tuple(grids[dim].window(out, sizes[dim])[0] for out in outs)
    return Work(line, parts, wanted, grids, pads, edges)


when_leaving(_planned.cache_clear)  # it holds meshes, which hold groups


def _is_alone(grid: Grid, size: int, part: Interval, out: Interval) -> bool:
    """Whether the windows `out` are those of torch's operator on `part`, which is all there is or has no padding."""
    pad = grid.p if part.size == size else 0
    starts = out.lo * grid.s - grid.p == part.lo - pad
    return starts and part.size >= grid.reach and grid.outputs(part.size, pad, False) == out.size > 0


@lru_cache(maxsize=1024)
def _edges(grid: Grid, size: int, outs: Intervals) -> tuple[tuple[int, tuple[Edge, ...]], ...] | None:
    """For each rank along a split dim of `size` the padding of its part, and its edges; None where it does not go."""
    found = []
    for own, out in zip(chunks(size, len(outs)), outs, strict=True):
        pad = own.lo - (out.lo * grid.s - grid.p)
        if not out.size or own.size < grid.reach or not 0 <= pad <= grid.k // 2:
            return None
        reads = [Interval(o * grid.s - grid.p, o * grid.s - grid.p + grid.reach) for o in range(out.lo, out.hi)]
        before = [i for i, read in enumerate(reads) if read.lo < own.lo and own.lo > 0]
        after = [i for i, read in enumerate(reads) if read.hi > own.hi and own.hi < size]
        if grid.outputs(own.size, pad, False) != out.size or len(before) + len(after) > min(MOST_EDGES, out.size - 1):
            return None
        edges = [Interval(near[0], near[-1] + 1) for near in (before, after) if near]
        spans = [Interval(reads[near.lo].lo, reads[near.hi - 1].hi) for near in edges]
        crossed = [(span.lo < own.lo) + (span.hi > own.hi) for span in spans]
        if any(span.lo < 0 or span.hi > size for span in spans) or any(count != 1 for count in crossed):
            return None
        rebased = (Interval(span.lo - own.lo, span.hi - own.lo) for span in spans)
        found.append((pad, tuple(Edge(*pair) for pair in zip(edges, rebased, strict=True))))
    return tuple(found)


class EdgePool(Node):
    """Maxima of this rank's windows. `window`: the same of a local part by way of a window, for second gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, work: Work, window: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        line, dim = work.line, work.line.dim
        posted = Posted(x, work.owned, work.wanted, line)
        y, index = work.pool(x, work.pads)
        pieces, saved = posted.pieces(), []
        for edge in work.edges:
            strip = _strip(x, edge.reads, work, pieces)
            near, at = work.pool(strip, work.strip_pads())
            y.narrow(dim, edge.outs.lo, edge.outs.size).copy_(near)
            saved += [strip, at]
        ctx.work, ctx.window = work, window
        ctx.save_for_backward(x, index, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, index, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            (d_x,) = torch.autograd.grad(ctx.window(x), x, grad, create_graph=True)
            return d_x, None, None
        return _backward(ctx.work, grad, x, index, saved), None, None


def _backward(
    work: Work, grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor, saved: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The gradient of the part; that of planes of others goes home meanwhile."""
    line, own, dim = work.line, work.owned[work.line.me], work.line.dim
    strips = []
    rest = grad.clone(memory_format=torch.preserve_format)
    for edge, strip, at in zip(work.edges, saved[::2], saved[1::2], strict=True):
        near = grad.narrow(dim, edge.outs.lo, edge.outs.size)
        strips.append((edge.reads, work.back(near, strip, at, work.strip_pads())))
        rest.narrow(dim, edge.outs.lo, edge.outs.size).zero_()

    def of(span: Interval) -> torch.Tensor:
        reads, d_strip = next(pair for pair in strips if pair[0].lo <= span.lo - own.lo < pair[0].hi)
        return d_strip.narrow(dim, span.lo - own.lo - reads.lo, span.size)

    posted = Posted(x, work.wanted, work.owned, line, of)
    d_x = work.back(rest, x, index, work.pads)
    for reads, d_strip in strips:
        inside = reads.meet(Interval(0, own.size))
        d_x.narrow(dim, inside.lo, inside.size).add_(d_strip.narrow(dim, inside.lo - reads.lo, inside.size))
    for span, _, piece in posted.pieces():
        d_x.narrow(dim, span.lo - own.lo, span.size).add_(piece)
    return d_x


def _strip(
    x: torch.Tensor, reads: Interval, work: Work, pieces: Sequence[tuple[Interval, int, torch.Tensor]]
) -> torch.Tensor:
    """The positions `reads` of the part extended by the planes of others, dense in the memory order of the part."""
    dim, own = work.line.dim, work.owned[work.line.me]
    shape = [*x.shape[:dim], reads.size, *x.shape[dim + 1 :]]
    out = torch.empty_strided(shape, dense_strides(x, shape), dtype=x.dtype, device=x.device)
    parts = [(Interval(0, own.size), x), *((Interval(s.lo - own.lo, s.hi - own.lo), p) for s, _, p in pieces)]
    for span, part in parts:
        both = span.meet(reads)
        if both.size:
            part = part.narrow(dim, both.lo - span.lo, both.size)
            out.narrow(dim, both.lo - reads.lo, both.size).copy_(part)
    return out
