"""Lines of an image near a cut: what a line of the neighbour adds to one line of outputs, as products of matrices.

Such a convolution is a few million operations, of which torch's kernels make more calls and copies than work. One
product for each tap adds up where the result is wanted, and reads line and weight where they lie.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from meshwright.parallel.signature import Conv, Signature

_DTYPES = (torch.float32, torch.float64)  # halves would be rounded once for each tap


class LineConv(NamedTuple):
    """Which taps of a weight meet what, along the dim that is not split: (tap, first output, outputs, first input)."""

    dim: int  # that is split
    tap: int  # of the weight along it
    stride: int
    taps: tuple[tuple[int, int, int, int], ...]

    def add_outputs(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add to the line `y` [1, F, outputs] what `x` [1, C, inputs] brings."""
        into, rows, filters = y[0].t(), x[0].t(), weight.select(self.dim, self.tap)
        for tap, out, count, at in self.taps:
            into.narrow(0, out, count).addmm_(self._read(rows, at, count), filters.select(2, tap).t())

    def input_gradient(self, grad: torch.Tensor, inputs: int, weight: torch.Tensor) -> torch.Tensor:
        """The gradient [1, C, inputs] of `x` for that of `y`."""
        rows, filters = grad[0].t(), weight.select(self.dim, self.tap)
        into = grad.new_zeros((inputs, weight.shape[1]))
        for tap, out, count, at in self.taps:
            self._read(into, at, count).addmm_(rows.narrow(0, out, count), filters.select(2, tap))
        return into.t().unsqueeze(0)

    def add_weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, d_weight: torch.Tensor) -> None:
        """Add to the gradient of the weight what `x` has part in."""
        g, rows, into = grad[0], x[0].t(), d_weight.select(self.dim, self.tap)
        for tap, out, count, at in self.taps:
            into.select(2, tap).addmm_(g.narrow(1, out, count), self._read(rows, at, count))

    def _read(self, rows: torch.Tensor, at: int, count: int) -> torch.Tensor:
        return rows[at : at + (count - 1) * self.stride + 1 : self.stride]


def are_lines(x: Signature, conv: Conv) -> bool:
    """Whether planes near a cut are lines of one image."""
    return x.ndim == 4 and x.shape[0] == 1 == conv.groups and x.dtype in _DTYPES and x.device.type == "cpu"


@lru_cache(maxsize=4096)
def line_conv(dim: int, tap: int, conv: Conv, before: int, inputs: int, outputs: int, kernel: int) -> LineConv:
    """That of what `tap` along the split `dim` reads; `before` zeros come before its `inputs` along the other."""
    stride, dilation = conv.stride[3 - dim], conv.dilation[3 - dim]
    found = []
    for k in range(kernel):
        shift = k * dilation - before  # output `o` reads input `o * stride + shift`
        first = max(0, -(shift // stride))
        count = min(outputs, (inputs - 1 - shift) // stride + 1) - first
        if count > 0:
            found.append((k, first, count, first * stride + shift))
    return LineConv(dim, tap, stride, tuple(found))
