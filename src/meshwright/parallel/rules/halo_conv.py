"""The convolution of a local part with every exchange hidden behind it (see docs/windows.md, "Linearity").

y = conv(local part, zeros beyond the cuts) + what the neighbours' planes add near each cut. Nothing is concatenated
but thin strips; saved are the part itself and the planes. Backward returns gradients of the planes in the opposite
order; the last dim's travel behind the main work. Where many output planes read beyond a cut, the planes are laid
next to the part instead (`hidden=False`); the choice is each rank's own, what travels is the same.

Double backward: y is linear in x and in w, so three functions are closed under differentiation, each with exchanges
of its own: `SpatialConv` (x, w → y), `InputGradient` (dy, w → dx) and `WeightGradient` (dy, x → dw).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from meshwright.parallel.account import totals
from meshwright.parallel.kernels import conv_backward, conv_forward, memory_format
from meshwright.parallel.matrix_conv import Room
from meshwright.parallel.node import Node
from meshwright.parallel.rules.halo import (
    Cut,
    Halo,
    Near,
    Pads,
    add_strip,
    again,
    arrived,
    blank,
    parted,
    post,
    post_back,
    received,
    thin_backward,
    thin_forward,
    whole,
)
from meshwright.parallel.rules.lines import LineConv, line_conv
from meshwright.parallel.signature import Conv

Mask = tuple[bool, bool, bool]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Work(NamedTuple):
    """The constants of a local convolution. `pads` are the zeros around the part per dim, so that exactly `out_sizes`
    outputs follow; along a cut dim they stand for the planes of the neighbours, which `cuts` fetch and add. If not
    `hidden`, they are the zeros around the part extended by the planes."""

    conv: Conv
    pads: Pads
    out_sizes: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    hidden: bool = True
    lines: bool = False  # planes near the cut are lines of an image: see `lines.py`


class SpatialConv(Node):
    """Convolution of a local part."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        work: Work,
    ) -> torch.Tensor:
        y, halos = _forward(x, weight, bias, work)
        ctx.work, ctx.has_bias = work, bias is not None
        ctx.save_for_backward(x, weight, *chain.from_iterable(halo.planes for halo in halos))
        return own(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        work: Work = ctx.work
        x, weight, *planes = ctx.saved_tensors
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            d_x = InputGradient.apply(grad, weight, x.detach(), work) if mask[0] else None
            d_weight = WeightGradient.apply(grad, x, weight.detach(), work) if mask[1] else None
            d_bias = _d_bias(grad) if mask[2] else None
        else:
            halos = again(work.cuts, planes, work.pads)
            d_x, d_weight, d_bias = _backward(grad, x, halos, weight, work, mask)
        return d_x, d_weight, d_bias, None


class InputGradient(Node):
    """The gradient of `SpatialConv` for its input (`x` gives its shape alone)."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, work: Work) -> torch.Tensor:
        ctx.work = work
        ctx.save_for_backward(grad, weight)
        d_x = _backward(grad, x, blank(x, work.cuts, work.pads), weight, work, (True, False, False))[0]
        assert d_x is not None
        return own(d_x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        grad, weight = ctx.saved_tensors
        d_grad = SpatialConv.apply(g, weight, None, ctx.work) if ctx.needs_input_grad[0] else None
        d_weight = WeightGradient.apply(grad, g, weight.detach(), ctx.work) if ctx.needs_input_grad[1] else None
        return d_grad, d_weight, None, None


class WeightGradient(Node):
    """The gradient of `SpatialConv` for its weight (`weight` gives its shape alone)."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, work: Work) -> torch.Tensor:
        ctx.work = work
        ctx.save_for_backward(grad, x)
        halos = received(x, work.cuts, work.pads)
        d_weight = _backward(grad, x, halos, weight, work, (False, True, False))[1]
        assert d_weight is not None
        return own(d_weight)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        grad, x = ctx.saved_tensors
        d_grad = SpatialConv.apply(x, g, None, ctx.work) if ctx.needs_input_grad[0] else None
        d_x = InputGradient.apply(grad, g, x.detach(), ctx.work) if ctx.needs_input_grad[1] else None
        return d_grad, d_x, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: Work
) -> tuple[torch.Tensor, list[Halo]]:
    """Outputs of this rank, and the planes that its neighbours sent. Collective."""
    conv, pads, out_sizes, cuts, hidden, lines = work
    if not hidden:
        halos = received(x, cuts, pads)
        y = main_forward(whole(x, halos), weight, bias, conv, pads, out_sizes)
        if memory_format(y) is torch.contiguous_format and not y.is_contiguous():  # cut out of more outputs
            last = memory_format(x) if memory_format(weight) is torch.contiguous_format else memory_format(weight)
            y = y.contiguous(memory_format=last)
        return y, halos
    posted = post(x, cuts[0], [], ()) if cuts else None
    y = main_forward(x, weight, bias, conv, pads, out_sizes)
    halos = []
    for level, cut in enumerate(cuts):
        if level:
            posted = post(x, cut, halos, cuts[:level])
        assert posted is not None
        halo = arrived(posted, pads, cut, cuts[:level])
        halos.append(halo)
        start = time.perf_counter()
        for near in cut.near:
            part = near.part(halo.planes, cut.dim)
            if lines and near.taps == 1:
                read = _line(near, halo, conv, part, out_sizes, weight)
                read.add_outputs(y.select(cut.dim, near.out), part.select(cut.dim, 0), weight)
                continue
            w = weight.narrow(cut.dim, near.tap, near.taps)
            y.narrow(cut.dim, near.out, 1).add_(thin_forward(part, w, conv, halo.pads, out_sizes, cut.dim))
        totals.boundary_s += time.perf_counter() - start
    return y, halos


def _backward(
    grad: torch.Tensor, x: torch.Tensor, halos: Sequence[Halo], weight: torch.Tensor, work: Work, mask: Mask
) -> Gradients:
    """Gradients for input, weight and bias, as far as `mask` asks for them. Collective if for the input."""
    conv, pads, _, cuts, hidden, _ = work
    if not hidden:
        window = whole(x, halos)
        d_window, d_weight, d_bias = main_backward(grad, window, weight, conv, pads, mask)
        d_x, d_halos = (None, []) if d_window is None else parted(d_window, x, halos)
        posted = post_back(x, d_halos[-1], cuts[:-1]) if d_halos else None
    else:
        thin = [_near_backward(halo, grad, weight, work, mask[:2]) for halo in halos] if any(mask[:2]) else []
        d_halos = [d_halo for d_halo, _ in thin] if mask[0] else []
        posted = post_back(x, d_halos[-1], cuts[:-1]) if d_halos else None
        d_x, d_weight, d_bias = main_backward(grad, x, weight, conv, pads, mask)
        for _, d_weights in thin:
            for add in d_weights:
                add(d_weight)
    for level in reversed(range(len(d_halos))):
        assert posted is not None
        assert d_x is not None
        cut = cuts[level]
        for span, _, piece in posted.pieces():
            add_strip(d_x, d_halos[:level], cut.dim, span.lo - cut.owned[cut.line.me].lo, piece)
        if level:
            posted = post_back(x, d_halos[level - 1], cuts[: level - 1])
    return d_x, d_weight, d_bias


def own(y: torch.Tensor) -> torch.Tensor:
    """`y` as no view, without a copy: slabs join as a view, and in-place work may follow on a plain tensor."""
    return torch.ops.aten._unsafe_view(y, y.shape).as_strided_(y.shape, y.stride()) if y._is_view() else y


def _d_bias(grad: torch.Tensor) -> torch.Tensor:
    return grad.sum((0, *range(2, grad.ndim)))


def _line(
    near: Near, halo: Halo, conv: Conv, part: torch.Tensor, out_sizes: Sequence[int], weight: torch.Tensor
) -> LineConv:
    dim, other = halo.cut.dim, 5 - halo.cut.dim
    sizes = part.shape[other], out_sizes[other - 2], weight.shape[other]
    return line_conv(dim, near.tap, conv, halo.pads[other - 2][0], *sizes)


def _add_to(dim: int, near: Near, share: torch.Tensor, d_weight: torch.Tensor) -> None:
    d_weight.narrow(dim, near.tap, near.taps).add_(share)


def _near_backward(
    halo: Halo, grad: torch.Tensor, weight: torch.Tensor, work: Work, mask: tuple[bool, bool]
) -> tuple[Halo, list[Callable[..., None]]]:
    """Gradients of the planes, and what adds to the gradient of the weight for each output near them: as far as `mask`
    asks for either."""
    start, dim, conv = time.perf_counter(), halo.cut.dim, work.conv
    d_planes: list[torch.Tensor | None] = [None] * len(halo.planes)
    d_weights: list[Callable[..., None]] = []
    for near in halo.cut.near:
        part = near.part(halo.planes, dim)
        if work.lines and near.taps == 1:
            g, read = grad.select(dim, near.out), _line(near, halo, conv, part, grad.shape[2:], weight)
            d_part = read.input_gradient(g, part.shape[5 - dim], weight).unsqueeze(dim) if mask[0] else None
            add: Callable[..., None] = partial(read.add_weight_gradient, g, part.select(dim, 0))
        else:
            g, w = grad.narrow(dim, near.out, 1), weight.narrow(dim, near.tap, near.taps)
            d_part, share = thin_backward(g, part, w, conv, halo.pads, dim, mask)
            add = partial(_add_to, dim, near, share)
        if mask[1]:
            d_weights.append(add)
        if mask[0]:
            assert d_part is not None
            held = d_planes[near.plane]
            if near.is_all:
                held = d_part
            else:
                held = torch.zeros_like(halo.planes[near.plane]) if held is None else held
                held.narrow(dim, near.at, near.size).add_(d_part)
            d_planes[near.plane] = held
    for index, plane in enumerate(halo.planes):
        if mask[0] and d_planes[index] is None:  # no output of this rank reads it
            d_planes[index] = torch.zeros_like(plane)
    totals.boundary_s += time.perf_counter() - start
    return Halo(halo.cut, [d for d in d_planes if d is not None], halo.pads), d_weights


def main_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, pads: Pads, out_sizes: Any
) -> torch.Tensor:
    """Of all that is here, which may be nothing."""
    if 0 in out_sizes or not x.numel():
        y = x.new_zeros((x.shape[0], weight.shape[0], *out_sizes))
        return y if bias is None else y + bias.view(1, -1, *(1 for _ in out_sizes))
    return conv_forward(x, weight, bias, conv, pads, out_sizes)


def main_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    pads: Pads,
    mask: tuple[bool, bool, bool],
    room: Room | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of that for input, weight and bias; see `conv_backward`."""
    if not grad.numel() or not x.numel():
        d_bias = _d_bias(grad) if mask[2] else None
        return torch.zeros_like(x) if mask[0] else None, torch.zeros_like(weight) if mask[1] else None, d_bias
    return conv_backward(grad, x, weight, conv, pads, mask, room)
