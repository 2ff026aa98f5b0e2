"""Average pooling along one split dim, with the exchange hidden behind the local work.

A sum is linear, as a convolution is (see docs/windows.md, "Linearity"): planes of neighbours are added to the windows
that read them when they are there, and nothing is laid together. The gradient is the adjoint, whose gradient is the
pooling again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from meshwright.parallel.comm import dense_strides
from meshwright.parallel.exchange import Intervals, Line, Posted
from meshwright.parallel.node import Node
from meshwright.parallel.taps import gather, gather_more, spread
from meshwright.plan.geometry import Interval


class Windows(NamedTuple):
    """The windows of all ranks along a line: `owned` and `wanted` are positions, `outs` the windows of each rank."""

    line: Line
    owned: Intervals
    wanted: Intervals
    outs: Intervals
    kernel: int
    stride: int
    padding: int
    share: float  # of each position in the result

    def over(self, span: Interval) -> tuple[int, int, int, int, float]:
        """Dim, kernel, stride, pad and share of this rank's windows over the positions of `span`."""
        first = self.outs[self.line.me].lo * self.stride - self.padding
        return self.line.dim, self.kernel, self.stride, span.lo - first, self.share


def _sized(like: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Memory for a part of this size along `dim`, in the order of `like`."""
    shape = [*like.shape[:dim], size, *like.shape[dim + 1 :]]
    return torch.empty_strided(shape, dense_strides(like, shape), dtype=like.dtype, device=like.device)


class LinePool(Node):
    """The sums of this rank's windows; its gradient is `LineSpread`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, windows: Windows) -> torch.Tensor:
        ctx.windows = windows
        line, me = windows.line, windows.line.me
        posted = Posted(x, windows.owned, windows.wanted, line)
        out = _sized(x, line.dim, windows.outs[me].size)
        gather(out, x, *windows.over(windows.owned[me]))
        for span, _, piece in posted.pieces():
            gather_more(out, piece, *windows.over(span))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return LineSpread.apply(grad, ctx.windows), None


class LineSpread(Node):
    """The adjoint of `LinePool`: each result hands its share to the positions of its window, wherever they are."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, windows: Windows) -> torch.Tensor:
        ctx.windows = windows
        line, own = windows.line, windows.owned[windows.line.me]

        def of(span: Interval) -> torch.Tensor:
            out = _sized(grad, line.dim, span.size)
            spread(out, grad, *windows.over(span))
            return out

        posted = Posted(grad, windows.wanted, windows.owned, line, of)
        out = of(own)
        for span, _, piece in posted.pieces():
            out.narrow(line.dim, span.lo - own.lo, span.size).add_(piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return LinePool.apply(grad, ctx.windows), None
