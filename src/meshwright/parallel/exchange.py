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
from functools import lru_cache, partial
from typing import Any

import torch
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.account import layer, totals
from meshwright.parallel.comm import Cause, dense_strides, wait
from meshwright.parallel.functions import sent_home
from meshwright.parallel.layout import axis_of
from meshwright.parallel.mesh import coordinates, group, sizes
from meshwright.parallel.redistribute import to_local
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

    @property
    def me(self) -> int:
        return coordinates(self.mesh)[self.axis]

    @property
    def ranks(self) -> int:
        return sizes(self.mesh)[self.axis]


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
    ) -> None:
        """Send what others want of `owned[me]`: slices of `local`, or whatever `take` gives for a global span.

        What arrives has the shape of `local` (or `shape_like`) but along the line's dim.
        """
        start = time.perf_counter()
        me, dim = line.me, line.dim
        out, into = pieces_of(owned, wanted, me)
        self.line, self._pieces = line, []
        sends: list[tuple[int, torch.Tensor]] = []
        receives: list[tuple[int, torch.Tensor]] = []
        for source, span in into:
            shape = list(local.shape if shape_like is None else shape_like)
            shape[dim] = span.size
            buffer, piece = _from_wire(shape, local)
            self._pieces.append((span, source, piece))
            receives.append((source, buffer))
        for target, span in out:
            piece = take(span) if take else local.narrow(dim, span.lo - owned[me].lo, span.size)
            nbytes, ndim = piece.numel() * piece.element_size(), piece.ndim
            if nbytes:
                line.cause.sent(nbytes)
                sends.append((target, piece.permute(0, *range(2, ndim), 1) if ndim > 2 else piece))
        self._transfer = None
        try:
            if sends or receives:
                self._transfer = Transfer(group(line.mesh, line.axis), sends, receives)
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
    posted = Posted(local, owned, wanted, line)
    own, want = owned[line.me], wanted[line.me]
    span = own.meet(want)
    parts = [(span.lo, local.narrow(line.dim, span.lo - own.lo, span.size))] if span.size else []
    parts += [(span.lo, piece) for span, _, piece in posted.pieces()]
    if not parts:
        shape = list(local.shape)
        shape[line.dim] = 0
        return local.new_empty(shape)
    parts.sort(key=lambda part: part[0])
    return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts], dim=line.dim)


def returned(grad: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> Callable[[], torch.Tensor]:
    """The adjoint of `fetched`, under way: each wanted position of `grad` goes home to its owner, who adds in the order
    of the ranks when it is called."""
    posted = Posted(grad, wanted, owned, line)
    return partial(_added, posted, grad, owned, wanted)


def _added(posted: Posted, grad: torch.Tensor, owned: Intervals, wanted: Intervals) -> torch.Tensor:
    line = posted.line
    own, want = owned[line.me], wanted[line.me]
    shape = list(grad.shape)
    shape[line.dim] = own.size
    is_many = sum(piece_span.size for piece_span, _, _ in posted._pieces) > own.size  # halves are added up in fp32
    dtype = torch.float32 if is_many and grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    out = torch.empty_strided(shape, dense_strides(grad, shape), dtype=dtype, device=grad.device)
    span = own.meet(want)
    lo, hi = (span.lo, span.hi) if span.size else (own.lo, own.lo)
    for ends in (Interval(own.lo, lo), Interval(hi, own.hi)):  # what this rank did not want itself
        out.narrow(line.dim, ends.lo - own.lo, ends.size).zero_()
    if span.size:
        mine = grad.narrow(line.dim, span.lo - want.lo, span.size)
        out.narrow(line.dim, span.lo - own.lo, span.size).copy_(mine)
    for piece_span, _, piece in sorted(posted.pieces(), key=lambda entry: entry[1]):
        out.narrow(line.dim, piece_span.lo - own.lo, piece_span.size).add_(piece)
    return out.to(grad.dtype)


class Fetch(Function):
    """Differentiable `fetched`; its gradient is `Return`, whose gradient is `Fetch` again."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, owned: Intervals, wanted: Intervals, line: Line) -> torch.Tensor:
        ctx.plan = owned, wanted, line
        return fetched(local, owned, wanted, line)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Return.apply(grad, *ctx.plan), None, None, None


class Return(Function):
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
    if dim != 1 and x._ledger is not None and x._ledger.by_filters:
        x = sent_home(x, [1], "window")
    axis = axis_of(tuple(x._spec.placements), dim)
    local = to_local(x)
    if axis is None:
        return local.narrow(dim, lo[0], hi[0] - lo[0])
    wanted = tuple(Interval(a, max(a, b)) for a, b in zip(lo, hi, strict=True))
    line = Line(x._spec.mesh, axis, dim, Cause(x._ledger, (layer(), "window")))
    return fetch(local, x.shape[dim], wanted, line)
