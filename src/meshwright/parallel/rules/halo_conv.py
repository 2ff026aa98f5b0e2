"""The convolution of a local part with every exchange hidden behind it (see docs/windows.md, "Linearity").

y = conv(local part, zeros beyond the cuts) + what the neighbours' planes add near each cut. Split dims are handled
one after the other: a later dim exchanges strips of the part *extended* by the planes that earlier dims brought, so
corners travel through the neighbour in between. Nothing is concatenated but thin strips; saved are the part itself
and the planes. Backward returns gradients of the planes in the opposite order; the last dim's travel behind the
main work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from meshwright.parallel.account import totals
from meshwright.parallel.exchange import Intervals, Line, Posted
from meshwright.parallel.kernels import Conv, conv_backward, conv_forward
from meshwright.plan.geometry import Interval

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """One split dim as this rank sees it. `first` is the global position of the first tap of its first output."""

    line: Line
    owned: Intervals
    wanted: Intervals
    first: int
    outputs: int
    edge: tuple[int, int]  # zeros before and after the wanted interval: the padding of the volume itself

    @property
    def dim(self) -> int:
        return self.line.dim


@dataclass(frozen=True)
class _Halo:
    """The planes a cut brought: (global span, tensor) in ascending order, and the pads to convolve them with."""

    cut: Cut
    planes: list[tuple[Interval, torch.Tensor]]
    pads: Pads

    def sides(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = self.cut.owned[self.cut.line.me].lo
        left = [plane for span, plane in self.planes if span.lo < own]
        return left, [plane for span, plane in self.planes if span.lo >= own]

    def near(self, conv: Conv, kernel: int) -> Iterator[tuple[int, int, int, int, int]]:
        """For each output plane that reads a plane of the halo: output, first tap, taps, index of the plane, offset."""
        stride, dilation = conv.stride[self.cut.dim - 2], conv.dilation[self.cut.dim - 2]
        for out in range(self.cut.outputs):
            start = self.cut.first + out * stride
            for index, (span, _) in enumerate(self.planes):
                j0 = max(0, -(-(span.lo - start) // dilation))
                j1 = min(kernel, (span.hi - 1 - start) // dilation + 1)
                if j1 > j0:
                    yield out, j0, j1 - j0, index, start + j0 * dilation - span.lo


def _strip(x: torch.Tensor, halos: Sequence[_Halo], dim: int, lo: int, size: int) -> torch.Tensor:
    """A slab along `dim` of `x` cut and extended to the wanted intervals of `halos`."""
    out = _kept(x, halos).narrow(dim, lo, size)
    for halo in halos:
        left, right = ([p.narrow(dim, lo, size) for p in side] for side in halo.sides())
        if left or right:
            out = torch.cat([*left, out, *right], dim=halo.cut.dim)
    return out


def _add_strip(d_x: torch.Tensor, d_halos: Sequence[_Halo], dim: int, lo: int, grad: torch.Tensor) -> None:
    """The adjoint of `_strip`: `grad` added to the gradients of `x` and of the planes."""
    for halo in reversed(d_halos):
        left, right = halo.sides()
        along = halo.cut.dim
        widths = [p.shape[along] for p in left], [p.shape[along] for p in right]
        middle = grad.shape[along] - sum(widths[0]) - sum(widths[1])
        pieces = grad.split([*widths[0], middle, *widths[1]], along)
        for plane, piece in zip([*left, *right], [*pieces[: len(left)], *pieces[len(left) + 1 :]], strict=True):
            plane.narrow(dim, lo, piece.shape[dim]).add_(piece)
        grad = pieces[len(left)]
    _kept(d_x, d_halos).narrow(dim, lo, grad.shape[dim]).add_(grad)


def _kept(x: torch.Tensor, halos: Sequence[_Halo]) -> torch.Tensor:
    """What the wanted intervals of `halos` read of the part itself (all of it, unless strides skip its ends)."""
    for halo in halos:
        own = halo.cut.owned[halo.cut.line.me]
        read = own.meet(halo.cut.wanted[halo.cut.line.me])
        x = x.narrow(halo.cut.dim, read.lo - own.lo, read.size)
    return x


def _extended(x: torch.Tensor, cuts: Sequence[Cut]) -> list[int]:
    """The shape of `x` extended along the dims of `cuts` to the wanted intervals."""
    shape = list(x.shape)
    for cut in cuts:
        shape[cut.dim] = cut.wanted[cut.line.me].size
    return shape


def _own(y: torch.Tensor) -> torch.Tensor:
    """`y` as no view, without a copy: slabs join as a view, and in-place work may follow on a plain tensor."""
    return torch.ops.aten._unsafe_view(y, y.shape).as_strided_(y.shape, y.stride()) if y._is_view() else y


class SpatialConv(Function):
    """Convolution of a local part. `pads` are the zeros around it per dim, so that exactly `out_sizes` outputs follow;
    along a cut dim they stand for the planes of the neighbours, which `cuts` fetch and add."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        conv: Conv,
        pads: Pads,
        out_sizes: tuple[int, ...],
        cuts: tuple[Cut, ...] = (),
    ) -> torch.Tensor:
        first = Posted(x, cuts[0].owned, cuts[0].wanted, cuts[0].line) if cuts else None
        y = _main_forward(x, weight, bias, conv, pads, out_sizes)
        halos: list[_Halo] = []
        for level, cut in enumerate(cuts):
            posted = first if level == 0 else _post(x, cut, halos, cuts[:level])
            assert posted is not None
            planes = sorted(((span, piece) for span, _, piece in posted.pieces()), key=lambda entry: entry[0].lo)
            halo = _Halo(cut, planes, _halo_pads(pads, cuts[:level]))
            halos.append(halo)
            start = time.perf_counter()
            for out, tap, taps, index, at in halo.near(conv, weight.shape[cut.dim]):
                part = _taken(planes[index][1], cut.dim, at, taps, conv)
                thin = _thin_forward(part, weight.narrow(cut.dim, tap, taps), conv, halo.pads, out_sizes, cut.dim)
                y.narrow(cut.dim, out, 1).add_(thin)
            totals.boundary_s += time.perf_counter() - start
        ctx.constants = conv, pads, cuts, bias is not None
        ctx.spans = [[span for span, _ in halo.planes] for halo in halos]
        ctx.save_for_backward(x, weight, *(plane for halo in halos for _, plane in halo.planes))
        return _own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        conv, pads, cuts, has_bias = ctx.constants
        x, weight, *saved = ctx.saved_tensors
        planes = iter(saved)
        halos = [
            _Halo(cut, [(span, next(planes)) for span in spans], _halo_pads(pads, cuts[:level]))
            for level, (cut, spans) in enumerate(zip(cuts, ctx.spans, strict=True))
        ]
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], has_bias and ctx.needs_input_grad[2])
        d_halos = [_d_planes(halo, grad, weight, conv) for halo in halos] if mask[0] else []
        posted = _post_back(x, d_halos[-1], cuts[:-1]) if d_halos else None
        d_x, d_weight, d_bias = _main_backward(grad, x, weight, conv, pads, mask)
        if mask[1] and d_weight is not None:
            for halo in halos:
                _add_d_weight(d_weight, halo, grad, weight, conv)
        for level in reversed(range(len(d_halos))):
            assert posted is not None
            assert d_x is not None
            cut = cuts[level]
            for span, _, piece in posted.pieces():
                _add_strip(d_x, d_halos[:level], cut.dim, span.lo - cut.owned[cut.line.me].lo, piece)
            if level:
                posted = _post_back(x, d_halos[level - 1], cuts[: level - 1])
        return d_x, d_weight, d_bias, None, None, None, None


def _post(x: torch.Tensor, cut: Cut, halos: Sequence[_Halo], before: Sequence[Cut]) -> Posted:
    """Strips of the extended part on their way along `cut`."""
    own = cut.owned[cut.line.me].lo

    def take(span: Interval) -> torch.Tensor:
        return _strip(x, halos, cut.dim, span.lo - own, span.size)

    return Posted(x, cut.owned, cut.wanted, cut.line, take, _extended(x, before))


def _post_back(x: torch.Tensor, d_halo: _Halo, before: Sequence[Cut]) -> Posted:
    """Gradients of a cut's planes on their way home."""
    cut = d_halo.cut

    def take(span: Interval) -> torch.Tensor:
        whole, plane = next((s, t) for s, t in d_halo.planes if s.meet(span).size)
        return plane.narrow(cut.dim, span.lo - whole.lo, span.size)

    return Posted(x, cut.wanted, cut.owned, cut.line, take, _extended(x, before))


def _halo_pads(pads: Pads, before: Sequence[Cut]) -> Pads:
    """Planes are extended along the dims of earlier cuts, so there only the padding of the volume is left."""
    edges = {cut.dim - 2: cut.edge for cut in before}
    return tuple(edges.get(i, pad) for i, pad in enumerate(pads))


def _taken(plane: torch.Tensor, dim: int, at: int, taps: int, conv: Conv) -> torch.Tensor:
    return plane.narrow(dim, at, (taps - 1) * conv.dilation[dim - 2] + 1)


def _d_planes(halo: _Halo, grad: torch.Tensor, weight: torch.Tensor, conv: Conv) -> _Halo:
    """Gradients of the planes."""
    start, dim = time.perf_counter(), halo.cut.dim
    found = [(span, torch.zeros_like(plane)) for span, plane in halo.planes]
    for out, tap, taps, index, at in halo.near(conv, weight.shape[dim]):
        part = _taken(found[index][1], dim, at, taps, conv)
        g, w = grad.narrow(dim, out, 1), weight.narrow(dim, tap, taps)
        part.add_(_thin_backward(g, part, w, conv, halo.pads, dim, (True, False))[0])
    totals.boundary_s += time.perf_counter() - start
    return _Halo(halo.cut, found, halo.pads)


def _add_d_weight(d_weight: torch.Tensor, halo: _Halo, grad: torch.Tensor, weight: torch.Tensor, conv: Conv) -> None:
    """What the planes add to the gradient of the weight."""
    start, dim = time.perf_counter(), halo.cut.dim
    for out, tap, taps, index, at in halo.near(conv, weight.shape[dim]):
        part = _taken(halo.planes[index][1], dim, at, taps, conv)
        g, w = grad.narrow(dim, out, 1), weight.narrow(dim, tap, taps)
        d_weight.narrow(dim, tap, taps).add_(_thin_backward(g, part, w, conv, halo.pads, dim, (False, True))[1])
    totals.boundary_s += time.perf_counter() - start


def _main_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, pads: Pads, out_sizes: Any
) -> torch.Tensor:
    if 0 in out_sizes or not x.numel():
        y = x.new_zeros((x.shape[0], weight.shape[0], *out_sizes))
        return y if bias is None else y + bias.view(1, -1, *(1 for _ in out_sizes))
    return conv_forward(x, weight, bias, conv, pads, out_sizes)


def _main_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Pads, mask: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if not grad.numel() or not x.numel():
        d_bias = grad.sum((0, *range(2, grad.ndim))) if mask[2] else None
        return torch.zeros_like(x) if mask[0] else None, torch.zeros_like(weight) if mask[1] else None, d_bias
    return conv_backward(grad, x, weight, conv, pads, mask)


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
