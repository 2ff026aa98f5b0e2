"""Planes of neighbours around a local part: how they are sent, laid next to it, and convolved near a cut.

Split dims are handled one after the other: a later dim exchanges strips of the part *extended* by the planes that
earlier dims brought, so corners travel through the neighbour in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshwright.parallel.comm import dense_strides
from meshwright.parallel.exchange import Intervals, Line, Posted
from meshwright.parallel.kernels import Conv, conv_backward, conv_forward
from meshwright.plan.geometry import Interval, transfers

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
class Halo:
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


def strip(x: torch.Tensor, halos: Sequence[Halo], dim: int, lo: int, size: int) -> torch.Tensor:
    """A slab along `dim` of `x` cut and extended to the wanted intervals of `halos`."""
    out = _kept(x, halos).narrow(dim, lo, size)
    for level, halo in enumerate(halos):
        left, right = ([_kept(p, halos[level + 1 :]).narrow(dim, lo, size) for p in side] for side in halo.sides())
        if left or right:
            out = _joined([*left, out, *right], halo.cut.dim, x)
    return out


def _joined(pieces: Sequence[torch.Tensor], dim: int, like: torch.Tensor) -> torch.Tensor:
    """Pieces one behind the other, dense in the memory order of `like`: torch's own cat forgets channels_last where a
    piece is one thick."""
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    out = torch.empty_strided(shape, dense_strides(like, shape), dtype=like.dtype, device=like.device)
    at = 0
    for piece in pieces:
        out.narrow(dim, at, piece.shape[dim]).copy_(piece)
        at += piece.shape[dim]
    return out


def whole(x: torch.Tensor, halos: Sequence[Halo]) -> torch.Tensor:
    """All of `x` cut and extended to the wanted intervals: the window that the outputs read."""
    return strip(x, halos, 0, 0, x.shape[0])


def add_strip(d_x: torch.Tensor, d_halos: Sequence[Halo], dim: int, lo: int, grad: torch.Tensor) -> None:
    """The adjoint of `strip`: `grad` added to the gradients of `x` and of the planes."""
    for level in reversed(range(len(d_halos))):
        halo = d_halos[level]
        left, right = halo.sides()
        along = halo.cut.dim
        widths = [p.shape[along] for p in left], [p.shape[along] for p in right]
        middle = grad.shape[along] - sum(widths[0]) - sum(widths[1])
        pieces = grad.split([*widths[0], middle, *widths[1]], along)
        for plane, piece in zip([*left, *right], [*pieces[: len(left)], *pieces[len(left) + 1 :]], strict=True):
            _kept(plane, d_halos[level + 1 :]).narrow(dim, lo, piece.shape[dim]).add_(piece)
        grad = pieces[len(left)]
    _kept(d_x, d_halos).narrow(dim, lo, grad.shape[dim]).add_(grad)


def parted(grad: torch.Tensor, x: torch.Tensor, halos: Sequence[Halo]) -> tuple[torch.Tensor, list[Halo]]:
    """The adjoint of `whole`: the gradient of a window as that of the part and of the planes."""
    d_x = torch.zeros_like(x)
    d_halos = [
        Halo(halo.cut, [(span, torch.zeros_like(plane)) for span, plane in halo.planes], halo.pads) for halo in halos
    ]
    add_strip(d_x, d_halos, 0, 0, grad)
    return d_x, d_halos


def _kept(x: torch.Tensor, halos: Sequence[Halo]) -> torch.Tensor:
    """What the wanted intervals of `halos` read of the part itself (all of it, unless strides skip its ends)."""
    for halo in halos:
        own = halo.cut.owned[halo.cut.line.me]
        read = own.meet(halo.cut.wanted[halo.cut.line.me])
        x = x.narrow(halo.cut.dim, min(read.lo - own.lo, own.size), read.size)
    return x


def _extended(x: torch.Tensor, cuts: Sequence[Cut]) -> list[int]:
    """The shape of `x` extended along the dims of `cuts` to the wanted intervals."""
    shape = list(x.shape)
    for cut in cuts:
        shape[cut.dim] = cut.wanted[cut.line.me].size
    return shape


def post(x: torch.Tensor, cut: Cut, halos: Sequence[Halo], before: Sequence[Cut]) -> Posted:
    """Strips of the extended part on their way along `cut`."""
    own = cut.owned[cut.line.me].lo

    def take(span: Interval) -> torch.Tensor:
        return strip(x, halos, cut.dim, span.lo - own, span.size)

    return Posted(x, cut.owned, cut.wanted, cut.line, take, _extended(x, before))


def post_back(x: torch.Tensor, d_halo: Halo, before: Sequence[Cut]) -> Posted:
    """Gradients of a cut's planes on their way home."""
    cut = d_halo.cut

    def take(span: Interval) -> torch.Tensor:
        held, plane = next((s, t) for s, t in d_halo.planes if s.meet(span).size)
        return plane.narrow(cut.dim, span.lo - held.lo, span.size)

    return Posted(x, cut.wanted, cut.owned, cut.line, take, _extended(x, before))


def arrived(posted: Posted, pads: Pads, cut: Cut, before: Sequence[Cut]) -> Halo:
    """The planes of an exchange, complete."""
    planes = sorted(((span, piece) for span, _, piece in posted.pieces()), key=lambda entry: entry[0].lo)
    return Halo(cut, planes, _halo_pads(pads, before))


def received(x: torch.Tensor, cuts: Sequence[Cut], pads: Pads) -> list[Halo]:
    """The planes of all cuts, fetched one cut after the other."""
    halos: list[Halo] = []
    for level, cut in enumerate(cuts):
        halos.append(arrived(post(x, cut, halos, cuts[:level]), pads, cut, cuts[:level]))
    return halos


def blank(x: torch.Tensor, cuts: Sequence[Cut], pads: Pads) -> list[Halo]:
    """What `received` gives, of zeros: for the shapes alone."""
    halos: list[Halo] = []
    for level, cut in enumerate(cuts):
        shape, planes = _extended(x, cuts[:level]), []
        for move in transfers(cut.owned, cut.wanted):
            if move.target == cut.line.me != move.source:
                shape[cut.dim] = move.span.size
                planes.append((move.span, x.new_zeros(shape)))
        halos.append(Halo(cut, sorted(planes, key=lambda entry: entry[0].lo), _halo_pads(pads, cuts[:level])))
    return halos


def again(
    cuts: Sequence[Cut], spans: Sequence[Sequence[Interval]], planes: Sequence[torch.Tensor], pads: Pads
) -> list[Halo]:
    """Saved planes with their spans put together again."""
    rest = iter(planes)
    return [
        Halo(cut, [(span, next(rest)) for span in held], _halo_pads(pads, cuts[:level]))
        for level, (cut, held) in enumerate(zip(cuts, spans, strict=True))
    ]


def _halo_pads(pads: Pads, before: Sequence[Cut]) -> Pads:
    """Planes are extended along the dims of earlier cuts, so there only the padding of the volume is left."""
    edges = {cut.dim - 2: cut.edge for cut in before}
    return tuple(edges.get(i, pad) for i, pad in enumerate(pads))


def taken(plane: torch.Tensor, dim: int, at: int, taps: int, conv: Conv) -> torch.Tensor:
    return plane.narrow(dim, at, (taps - 1) * conv.dilation[dim - 2] + 1)


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


def thin_forward(
    part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, out_sizes: Any, dim: int
) -> torch.Tensor:
    out_sizes = (*out_sizes[: dim - 2], 1, *out_sizes[dim - 1 :])
    part, weight, conv, pads, flat = _thin(part, weight, conv, pads, dim)
    y = conv_forward(part, weight, None, conv, pads, _without(out_sizes, dim) if flat else out_sizes)
    return y.unsqueeze(dim) if flat else y


def thin_backward(
    grad: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, dim: int, mask: Any
) -> tuple[Any, ...]:
    part, weight, conv, pads, flat = _thin(part, weight, conv, pads, dim)
    grad = grad.squeeze(dim) if flat else grad
    d_x, d_w, _ = conv_backward(grad, part, weight, conv, pads, (*mask, False))
    return tuple(t if t is None or not flat else t.unsqueeze(dim) for t in (d_x, d_w))
