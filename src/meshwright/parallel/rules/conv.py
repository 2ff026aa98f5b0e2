"""Convolution and transposed convolution on split space.

Window of a convolution: output [a, b) reads input [a s - p, (b - 1) s - p + d (k - 1) + 1).
Window of a transposed convolution: output [a, b) reads input
[ceil((a + p - d (k - 1)) / s), floor((b - 1 + p) / s) + 1).

Convolution is linear, which hides the exchange (docs/windows.md): the local part is convolved with zeros beyond the
cut while the neighbours' planes travel; then each output plane near the cut gets what those planes add. Nothing is
concatenated and the activation is not copied. Backward runs the other way round: gradients of the neighbours'
planes first, then the main work while they travel, then what arrives is added.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshwright.parallel.account import totals
from meshwright.parallel.exchange import Intervals, Line, Posted, fetch
from meshwright.parallel.functions import (
    as_mesh,
    autocast,
    cause_for,
    function,
    gathered,
    mesh_of,
    placements_of,
    tuple_of,
)
from meshwright.parallel.kernels import Conv, conv_backward, conv_forward, widened
from meshwright.parallel.layout import axis_of, local_shape, owned, split_axes
from meshwright.parallel.mesh import sizes
from meshwright.parallel.redistribute import from_local, replicate, to_local
from meshwright.plan.geometry import Interval, chunks

MAX_THIN = 8  # more output planes than this near a cut: one window is cheaper than plane by plane

_CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}


@dataclass(frozen=True)
class Cut:
    """The split dim whose exchange is hidden: geometry of one rank."""

    line: Line
    owned: Intervals
    wanted: Intervals
    before: int  # zeros in front of the local part, up to the first tap
    first: int  # global position of the first tap of the first output
    outputs: int


def _window(out: Interval, size: int, k: int, s: int, d: int, p: int) -> tuple[Interval, int, int]:
    """Input interval inside `[0, size)` that output `out` reads, and the zeros it reads before and after it."""
    if not out.size:
        return Interval(0, 0), 0, 0
    lo, hi = out.lo * s - p, (out.hi - 1) * s - p + d * (k - 1) + 1
    inside = Interval(lo, hi).meet(Interval(0, size))
    if not inside.size:
        return Interval(0, 0), hi - lo, 0
    return inside, inside.lo - lo, hi - inside.hi


class SpatialConv(Function):
    """Convolution of a local part with the exchange along one dim hidden behind it.

    `pads` are the zeros before and after the local part per dim, so that exactly `out_sizes` outputs follow;
    along the cut dim they stand for the planes of the neighbours.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        conv: Conv,
        pads: tuple[tuple[int, int], ...],
        out_sizes: tuple[int, ...],
        cut: Cut | None,
    ) -> torch.Tensor:
        posted = Posted(x, cut.owned, cut.wanted, cut.line) if cut else None
        y = _main_forward(x, weight, bias, conv, pads, out_sizes)
        halos: list[tuple[Interval, torch.Tensor]] = []
        if cut and posted:
            halos = [(span, piece) for span, _, piece in posted.pieces()]
            start = time.perf_counter()
            for out, taps, part in _near(cut, conv, weight, halos):
                dim = cut.line.dim
                y.narrow(dim, out, 1).add_(_thin_forward(part, weight.narrow(dim, *taps), conv, pads, out_sizes, dim))
            totals.boundary_s += time.perf_counter() - start
        ctx.spans = [span for span, _ in halos]
        ctx.constants = conv, pads, cut, bias is not None
        ctx.save_for_backward(x, weight, *(piece for _, piece in halos))
        return _own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        conv, pads, cut, has_bias = ctx.constants
        x, weight, *pieces = ctx.saved_tensors
        halos = list(zip(ctx.spans, pieces, strict=True))
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], has_bias and ctx.needs_input_grad[2])
        posted = None
        thin = list(_near(cut, conv, weight, halos)) if cut else []
        if cut and mask[0]:
            dim = cut.line.dim
            start = time.perf_counter()
            d_halos = [torch.zeros_like(piece) for piece in pieces]
            for (out, taps, _), (d_part) in zip(thin, _near_parts(cut, conv, weight, ctx.spans, d_halos), strict=True):
                g = grad.narrow(dim, out, 1)
                d, _ = _thin_backward(g, d_part, weight.narrow(dim, *taps), conv, pads, dim, (True, False))
                d_part.add_(d)
            totals.boundary_s += time.perf_counter() - start

            def take(span: Interval) -> torch.Tensor:
                whole, piece = next((s, t) for s, t in zip(ctx.spans, d_halos, strict=True) if s.meet(span).size)
                return piece.narrow(dim, span.lo - whole.lo, span.size)

            posted = Posted(x, cut.wanted, cut.owned, cut.line, take)
        d_x, d_weight, d_bias = _main_backward(grad, x, weight, conv, pads, mask)
        if mask[1] and d_weight is not None:
            start = time.perf_counter()
            for out, taps, part in thin:
                g = grad.narrow(cut.line.dim, out, 1)
                _, d = _thin_backward(
                    g, part, weight.narrow(cut.line.dim, *taps), conv, pads, cut.line.dim, (False, True)
                )
                d_weight.narrow(cut.line.dim, *taps).add_(d)
            totals.boundary_s += time.perf_counter() - start
        if posted and d_x is not None:
            for span, _, piece in posted.pieces():
                d_x.narrow(cut.line.dim, span.lo - cut.owned[cut.line.me].lo, span.size).add_(piece)
        return d_x, d_weight, d_bias, None, None, None, None


def _own(y: torch.Tensor) -> torch.Tensor:
    """`y` as no view, without a copy: slabs join as a view, and in-place work may follow on a plain tensor."""
    return torch.ops.aten._unsafe_view(y, y.shape).as_strided_(y.shape, y.stride()) if y._is_view() else y


def _main_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, pads: Any, out_sizes: Any
) -> torch.Tensor:
    if 0 in out_sizes or not x.numel():
        y = x.new_zeros((x.shape[0], weight.shape[0], *out_sizes))
        return y if bias is None else y + bias.view(1, -1, *(1 for _ in out_sizes))
    return conv_forward(x, weight, bias, conv, pads, out_sizes)


def _main_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, mask: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if not grad.numel() or not x.numel():
        d_bias = grad.sum((0, *range(2, grad.ndim))) if mask[2] else None
        return torch.zeros_like(x) if mask[0] else None, torch.zeros_like(weight) if mask[1] else None, d_bias
    return conv_backward(grad, x, weight, conv, pads, mask)


def _near(
    cut: Cut, conv: Conv, weight: torch.Tensor, halos: Sequence[tuple[Interval, torch.Tensor]]
) -> Iterator[tuple[int, tuple[int, int], torch.Tensor]]:
    """For each output plane that reads a neighbour's plane: its local index, (first tap, number of taps), planes."""
    dim = cut.line.dim
    k, s, d = weight.shape[dim], conv.stride[dim - 2], conv.dilation[dim - 2]
    for out in range(cut.outputs):
        start = cut.first + out * s
        for span, piece in halos:
            j0 = max(0, -(-(span.lo - start) // d))
            j1 = min(k, (span.hi - 1 - start) // d + 1)
            if j1 > j0:
                at = start + j0 * d - span.lo
                yield out, (j0, j1 - j0), piece.narrow(dim, at, (j1 - j0 - 1) * d + 1)


def _near_parts(
    cut: Cut, conv: Conv, weight: torch.Tensor, spans: Sequence[Interval], pieces: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The same planes, taken out of other tensors of the halos' shapes."""
    return (part for _, _, part in _near(cut, conv, weight, list(zip(spans, pieces, strict=True))))


def _without(values: Sequence[Any], dim: int) -> tuple[Any, ...]:
    return (*values[: dim - 2], *values[dim - 1 :])


def _thin(part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, dim: int) -> tuple[Any, ...]:
    """A slab that yields one output plane: a convolution with one dim less where a single tap reads it."""
    if weight.shape[dim] == 1 and weight.ndim > 3:
        flat = Conv(_without(conv.stride, dim), _without(conv.dilation, dim), conv.groups)
        return part.squeeze(dim), weight.squeeze(dim), flat, _without(pads, dim), True
    stride = (*conv.stride[: dim - 2], 1, *conv.stride[dim - 1 :])
    here = (*pads[: dim - 2], (0, 0), *pads[dim - 1 :])
    return part, weight, Conv(stride, conv.dilation, conv.groups), here, False


def _thin_forward(
    part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, out_sizes: Any, dim: int
) -> torch.Tensor:
    out_sizes = (*out_sizes[: dim - 2], 1, *out_sizes[dim - 1 :])
    part, weight, conv, pads, flat = _thin(part, weight, conv, pads, dim)
    y = conv_forward(part, weight, None, conv, pads, _without(out_sizes, dim) if flat else out_sizes)
    return y.unsqueeze(dim) if flat else y


def _thin_backward(
    grad: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, dim: int, mask: Any
) -> tuple[Any, ...]:
    part, weight, conv, pads, flat = _thin(part, weight, conv, pads, dim)
    grad = grad.squeeze(dim) if flat else grad
    d_x, d_w, _ = conv_backward(grad, part, weight, conv, pads, (*mask, False))
    return tuple(t if t is None or not flat else t.unsqueeze(dim) for t in (d_x, d_w))


@function(*_CONVS)
def conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """Convolution of any kernel, stride, dilation, padding and groups; 1-D to 3-D."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = (as_mesh(v, mesh) for v in (input, weight, bias))
    n = weight.ndim - 2
    if x.ndim == n + 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    x, weight, bias = autocast(x, weight, bias)
    stride, dilation = tuple_of(stride, n), tuple_of(dilation, n)
    kernel = tuple(weight.shape[2:])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        if any(s != 1 for s in stride):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(p, p) for p in tuple_of(0 if padding == "valid" else padding, n)]
    x = gathered(x, [1], "convolution")
    weight, bias = replicate(weight), None if bias is None else replicate(bias)
    placements, shape = placements_of(x), tuple(x.shape)
    if shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"convolution: the input {shape} has {shape[1]} channels, the weight {tuple(weight.shape)} with "
            f"groups={groups} expects {weight.shape[1] * groups}"
        )
    cause = cause_for("convolution", x, weight)
    sizes_out = [(shape[i + 2] + sum(ends[i]) - reach[i] - 1) // stride[i] + 1 for i in range(n)]
    if min(sizes_out) < 1:
        raise RuntimeError(f"convolution: kernel {kernel} with dilation {dilation} exceeds the padded input {shape}")
    axes = split_axes(placements)
    local = to_local(x)
    w, b = to_local(weight, axes), None if bias is None else to_local(bias, axes)
    out_shape = (shape[0], weight.shape[0], *sizes_out)
    local_out = local_shape(mesh, placements, out_shape)[2:]
    pads, cut = list(ends), None
    for i in reversed(range(n)):  # the outermost split dim last: its planes are the ones that lie together in memory
        dim = i + 2
        axis = axis_of(placements, dim)
        if axis is None:
            continue
        line = Line(mesh, axis, dim, cause)
        args = (shape[dim], kernel[i], stride[i], dilation[i], ends[i][0])
        windows = [_window(out, *args) for out in chunks(sizes_out[i], line.ranks)]
        wanted = tuple(w[0] for w in windows)
        have = chunks(shape[dim], line.ranks)
        inside, before, after = windows[line.me]
        own = have[line.me]
        outer = all(axis_of(placements, d) is None for d in range(2, dim))
        if outer and inside.size and own.size and own.meet(inside).size:
            left, right = max(0, own.lo - inside.lo), max(0, inside.hi - own.hi)
            thin = -(-left // stride[i]) + -(-right // stride[i])
            if thin <= MAX_THIN and local_out[i]:
                pads[i] = (before + own.lo - inside.lo, after + inside.hi - own.hi)
                cut = Cut(line, have, wanted, pads[i][0], inside.lo - before, local_out[i])
                continue
        local = fetch(local, shape[dim], wanted, line)
        pads[i] = (before, after)
    y = SpatialConv.apply(local, w, b, Conv(stride, dilation, groups), tuple(pads), tuple(local_out), cut)
    return from_local(y, mesh, placements, out_shape, cause.ledger)


@function(*_TRANSPOSED)
def conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Transposed convolution; output positions beyond the last window hold the bias alone."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = (as_mesh(v, mesh) for v in (input, weight, bias))
    n = weight.ndim - 2
    if x.ndim == n + 1:
        return conv_transpose(x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation).squeeze(
            0
        )
    x, weight, bias = autocast(x, weight, bias)
    native: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]
    stride, dilation, padding = tuple_of(stride, n), tuple_of(dilation, n), tuple_of(padding, n)
    extra = tuple_of(output_padding, n)
    x = gathered(x, [1], "conv_transpose")
    weight, bias = replicate(weight), None if bias is None else replicate(bias)
    placements, shape = placements_of(x), tuple(x.shape)
    cause = cause_for("conv_transpose", x, weight)
    axes = split_axes(placements)
    local, w = to_local(x), to_local(weight, axes)
    b = None if bias is None else to_local(bias, axes)
    kernel = tuple(weight.shape[2:])
    sizes_out = [
        (shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1 for i in range(n)
    ]
    out_shape = (shape[0], weight.shape[1] * groups, *sizes_out)
    local_pad, local_extra, crops = list(padding), list(extra), []
    for i in range(n):
        dim = i + 2
        axis = axis_of(placements, dim)
        if axis is None:
            continue
        ranks = sizes(mesh)[axis]
        s, p, r = stride[i], padding[i], dilation[i] * (kernel[i] - 1)

        def need(out: Interval, s: int = s, p: int = p, r: int = r, size: int = shape[dim]) -> Interval:
            if not out.size:
                return Interval(0, 0)
            return Interval(-(-(out.lo + p - r) // s), (out.hi - 1 + p) // s + 1).meet(Interval(0, size))

        wanted = tuple(need(out) for out in chunks(sizes_out[i], ranks))
        local = fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))
        out, got = owned(mesh, placements, dim, sizes_out[i]), wanted[Line(mesh, axis, dim, cause).me]
        local_pad[i] = local_extra[i] = 0
        crops.append((dim, out, got.lo * s - p))
    local_out = local_shape(mesh, placements, out_shape)
    whole = not crops or all(local.shape[dim] and out.size for dim, out, _ in crops)
    if not whole or not local.numel():
        y = local.new_zeros(local_out) + (local.sum() + w.sum()) * 0  # nothing here, but part of the graph
        exact = False
    else:
        exact = all(
            start == out.lo
            and (local.shape[dim] - 1) * stride[dim - 2] + dilation[dim - 2] * (kernel[dim - 2] - 1) + 1 == out.size
            for dim, out, start in crops
        )
        wide: Any = [t.float() if t is not None and widened(local) else t for t in (local, w, b if exact else None)]
        y = native(*wide, stride, local_pad, local_extra, groups, dilation).to(local.dtype)
        for dim, out, start in crops if not exact else []:
            y = _crop(y, dim, start, out)
    if b is not None and not exact:
        y = y + b.view(1, -1, *(1 for _ in range(n)))
    return from_local(y, mesh, placements, out_shape, cause.ledger)


def _crop(y: torch.Tensor, dim: int, start: int, out: Interval) -> torch.Tensor:
    """Positions `out` of a result whose first position is `start`; positions beyond its end are zero."""
    lo = out.lo - start
    hi = min(y.shape[dim], out.hi - start)
    y = y.narrow(dim, max(0, lo), max(0, hi - max(0, lo)))
    missing = out.size - y.shape[dim]
    if missing:
        pad = [0, 0] * (y.ndim - 1 - dim) + [max(0, -lo), missing - max(0, -lo)]
        y = F.pad(y, pad)
    return y
