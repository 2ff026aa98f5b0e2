"""The window exchange: every rank fetches an arbitrary interval of a split dim from whoever owns it.

This is the one primitive under every spatial rule. The intervals may be uneven, empty, wider than a shard, and
overlap; all ranks know all intervals (they are arithmetic of the global shape), so sends and receives pair up
without negotiation. Backward is the adjoint: what a rank got is sent back and added by its owner to its own, in the
order of the ranks, so that results are the same bits in every run.

On the wire a piece lies channels-last (N, ..., C): a slab of a `channels_last_3d` activation is sent without a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.account import layer, totals
from meshwright.parallel.comm import Cause, dense_strides, wait
from meshwright.parallel.functions import sent_home
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import axis_of
from meshwright.parallel.mesh import coordinates, group, sizes
from meshwright.parallel.node import Node
from meshwright.parallel.parts import to_local
from meshwright.parallel.transport import Transfer
from meshwright.plan.geometry import Interval, chunks, transfers

Intervals = tuple[Interval, ...]
Piece = tuple[int, Interval]


@dataclass(frozen=True)
class Line:
    """The ranks along one mesh axis, who exchange pieces of tensor dim `dim` on behalf of `cause`."""

    mesh: DeviceMesh
    axis: int
    dim: int
    cause: Cause

    @cached_property
    def me(self) -> int:
        return coordinates(self.mesh)[self.axis]

    @cached_property
    def ranks(self) -> int:
        return sizes(self.mesh)[self.axis]

    @cached_property
    def group(self) -> dist.ProcessGroup:
        return group(self.mesh, self.axis)


@lru_cache(maxsize=65536)
def pieces_of(owned: Intervals, wanted: Intervals, me: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """What rank `me` sends to others, and what it gets from them: (rank, span) each."""
    moves = [move for move in transfers(owned, wanted) if move.source != move.target]
    sends = tuple((move.target, move.span) for move in moves if move.source == me)
    return sends, tuple((move.source, move.span) for move in moves if move.target == me)


def _from_wire(shape: Sequence[int], reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty wire buffer for a piece of `shape`, and the same memory seen as the piece."""
    ndim = len(shape)
    if ndim <= 2:
        buffer = reference.new_empty(tuple(shape))
        return buffer, buffer
    buffer = reference.new_empty((shape[0], *shape[2:], shape[1]))
    return buffer, buffer.permute(0, ndim - 1, *range(1, ndim - 1))


def _in_place(into: torch.Tensor, dim: int, at: int, size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same for the place of a piece in a larger tensor; None if it does not lie there as it does on the wire."""
    piece = into.narrow(dim, at, size)
    buffer = piece.permute(0, *range(2, piece.ndim), 1) if piece.ndim > 2 else piece
    return (buffer, piece) if buffer.is_contiguous() else None


class Posted:
    """An exchange under way. `pieces()` waits and returns the received (span, source, tensor), in rank order."""

    def __init__(
        self,
        local: torch.Tensor,
        owned: Intervals,
        wanted: Intervals,
        line: Line,
        take: Callable[[Interval], torch.Tensor] | None = None,
        shape_like: Sequence[int] | None = None,
        into: torch.Tensor | None = None,
    ) -> None:
        """Send what others want of `owned[me]`: slices of `local`, or whatever `take` gives for a global span.

        What arrives has the shape of `local` (or `shape_like`) but along the line's dim. It arrives in its place in
        `into`, which holds `wanted[me]`, if that is given and a piece lies there as it does on the wire.
        """
        start = time.perf_counter()
        me, dim = line.me, line.dim
        leaving, coming = pieces_of(owned, wanted, me)
        self.line, self._pieces = line, []
        sends: list[tuple[int, torch.Tensor]] = []
        receives: list[tuple[int, torch.Tensor]] = []
        for source, span in coming:
            size = span.hi - span.lo
            found = None if into is None else _in_place(into, dim, span.lo - wanted[me].lo, size)
            if found is None:
                shape = list(local.shape if shape_like is None else shape_like)
                shape[dim] = size
                found = _from_wire(shape, local)
            buffer, piece = found
            self._pieces.append((span, source, piece))
            receives.append((source, buffer))
        for target, span in leaving:
            piece = take(span) if take else local.narrow(dim, span.lo - owned[me].lo, span.hi - span.lo)
            nbytes, ndim = piece.nbytes, piece.ndim
            if nbytes:
                line.cause.sent(nbytes)
                sends.append((target, piece.permute(0, *range(2, ndim), 1) if ndim > 2 else piece))
        self._transfer = None
        try:
            if sends or receives:
                self._transfer = Transfer(line.group, sends, receives)
        except RuntimeError as error:
            raise line.cause.failed(error) from error
        totals.exchange_post_s += time.perf_counter() - start

    def pieces(self) -> list[tuple[Interval, int, torch.Tensor]]:
        """The pieces from other ranks, complete."""
        if self._transfer is not None:
            wait([self._transfer], self.line.cause)
            self._transfer = None
        return self._pieces


def fetched(local: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> torch.Tensor:
    """The wanted interval of this rank, from `local` and the other ranks."""
    dim, own, want = line.dim, owned[line.me], wanted[line.me]
    span, order = own.meet(want), memory_format(local)
    if order is not torch.contiguous_format and span.size < want.size and local.numel():  # pieces lie as on the wire
        shape = list(local.shape)
        shape[dim] = want.size
        return _joined(
            local, owned, wanted, line, torch.empty(shape, dtype=local.dtype, device=local.device, memory_format=order)
        )
    posted = Posted(local, owned, wanted, line)
    parts = [(span.lo, local.narrow(dim, span.lo - own.lo, span.size))] if span.size else []
    parts += [(span.lo, piece) for span, _, piece in posted.pieces()]
    if not parts:
        shape = list(local.shape)
        shape[dim] = 0
        return local.new_empty(shape)
    parts.sort(key=itemgetter(0))
    return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts], dim=dim)


def _joined(local: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line, out: torch.Tensor) -> torch.Tensor:
    """The same in `out`, where pieces arrive in their places as far as that is possible."""
    dim, own, first = line.dim, owned[line.me], wanted[line.me].lo
    posted = Posted(local, owned, wanted, line, into=out)
    lo, hi = own.meet(wanted[line.me])
    if lo < hi:
        out.narrow(dim, lo - first, hi - lo).copy_(local.narrow(dim, lo - own.lo, hi - lo))
    for (lo, hi), _, piece in posted.pieces():
        there = out.narrow(dim, lo - first, hi - lo)
        if piece.data_ptr() != there.data_ptr():
            there.copy_(piece)
    return out


def returned(grad: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> Callable[[], torch.Tensor]:
    """The adjoint of `fetched`, under way: each wanted position of `grad` goes home to its owner, who adds in the order
    of the ranks when it is called."""
    posted = Posted(grad, wanted, owned, line)
    return partial(_added, posted, grad, owned, wanted)


def _added(posted: Posted, grad: torch.Tensor, owned: Intervals, wanted: Intervals) -> torch.Tensor:
    line = posted.line
    dim, own = line.dim, owned[line.me]
    ends, mine, is_many = _kept(owned, wanted, line.me)
    shape = list(grad.shape)
    shape[dim] = own.hi - own.lo
    dtype = torch.float32 if is_many and grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    out = torch.empty_strided(shape, dense_strides(grad, shape), dtype=dtype, device=grad.device)
    for at, size in ends:
        out.narrow(dim, at, size).zero_()
    pieces = sorted(posted.pieces(), key=_source)
    if mine is not None:
        at, size, start = mine
        part = grad.narrow(dim, start, size)
        if size == shape[dim] and pieces and pieces[0][0] == own and dtype is grad.dtype:  # both passes in one
            torch.add(part, pieces.pop(0)[2], out=out)
        else:
            out.narrow(dim, at, size).copy_(part)
    for (lo, hi), _, piece in pieces:
        out.narrow(dim, lo - own.lo, hi - lo).add_(piece)
    return out if dtype is grad.dtype else out.to(grad.dtype)


_source = itemgetter(1)


@lru_cache(maxsize=4096)
def _kept(
    owned: Intervals, wanted: Intervals, me: int
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int, int] | None, bool]:
    """Of a rank that gets back what it gave: what it did not want itself (position and size in its part), what it did
    (also the position in what it wanted), and whether pieces overlap, so that halves are to be added up in fp32."""
    own, want = owned[me], wanted[me]
    span = own.meet(want)
    lo, hi = (span.lo, span.hi) if span.size else (own.lo, own.lo)
    ends = tuple((end.lo - own.lo, end.size) for end in (Interval(own.lo, lo), Interval(hi, own.hi)) if end.size)
    back = pieces_of(wanted, owned, me)[1]
    mine = (span.lo - own.lo, span.size, span.lo - want.lo) if span.size else None
    return ends, mine, sum(piece.size for _, piece in back) > own.size


class Fetch(Node):
    """Differentiable `fetched`; its gradient is `Return`, whose gradient is `Fetch` again."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> torch.Tensor:
        ctx.plan = owned, wanted, line
        return fetched(local, owned, wanted, line)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Return.apply(grad, *ctx.plan), None, None, None


class Return(Node):
    """Differentiable `returned`."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> torch.Tensor:
        ctx.plan = owned, wanted, line
        return returned(grad, owned, wanted, line)()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Fetch.apply(grad, *ctx.plan), None, None, None


def fetch(local: torch.Tensor, size: int, wanted: Intervals, line: Line) -> torch.Tensor:
    """This rank's wanted interval of a dim of global `size` chunked over the line; on local tensors, differentiable."""
    owned = chunks(size, line.ranks)
    if owned == wanted:
        return local
    return Fetch.apply(local, owned, wanted, line)


def window(x: Any, dim: int, lo: Sequence[int], hi: Sequence[int]) -> torch.Tensor:
    """For each rank along the axis that splits `dim` of mesh tensor `x`, the global interval `[lo[i], hi[i])`.

    Returns this rank's interval as a plain local tensor; differentiable (backward sends home and adds), collective.
    Intervals must lie in `[0, x.shape[dim])`. If no axis splits `dim`, `lo` and `hi` have one entry. What convolutions
    split by channels is first split as the plan says.
    """
    dim %= x.ndim
    if x._ledger is not None and x._ledger.by_filters:
        x = sent_home(x, [1], "window")
    axis = axis_of(tuple(x._spec.placements), dim)
    local = to_local(x)
    if axis is None:
        return local.narrow(dim, lo[0], hi[0] - lo[0])
    wanted = tuple(Interval(a, max(a, b)) for a, b in zip(lo, hi, strict=True))
    line = Line(x._spec.mesh, axis, dim, Cause(x._ledger, (layer(), "window")))
    return fetch(local, x.shape[dim], wanted, line)
