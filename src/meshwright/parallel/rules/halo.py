"""Planes of neighbours around a local part: how they are sent, laid next to it, and convolved near a cut.

Split dims are handled one after the other: a later dim exchanges strips of the part *extended* by the planes that
earlier dims brought, so corners travel through the neighbour in between.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from meshwright.parallel.comm import dense_strides
from meshwright.parallel.exchange import Intervals, Line, Posted, pieces_of
from meshwright.parallel.kernels import conv_backward, conv_forward
from meshwright.parallel.signature import Conv, Pads
from meshwright.plan.geometry import Interval


class Near(NamedTuple):
    """One output plane that reads one plane of the halo: `taps` taps from `tap` on, `size` positions from `at` on."""

    out: int
    tap: int
    taps: int
    plane: int
    at: int
    size: int
    is_all: bool  # the whole plane, which no other output reads

    def part(self, planes: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """What the output reads."""
        return planes[self.plane] if self.is_all else planes[self.plane].narrow(dim, self.at, self.size)


@dataclass(frozen=True)
class Cut:
    """One split dim as this rank sees it. `first` is the global position of the first tap of its first output."""

    line: Line
    owned: Intervals
    wanted: Intervals
    first: int
    outputs: int
    edge: tuple[int, int]  # zeros before and after the wanted interval: the padding of the volume itself
    taps: tuple[int, int, int]  # kernel, stride and dilation

    @cached_property
    def dim(self) -> int:
        return self.line.dim

    @cached_property
    def spans(self) -> tuple[Interval, ...]:
        """Where the planes lie that others send, in ascending order."""
        return tuple(span for _, span in pieces_of(self.owned, self.wanted, self.line.me)[1])

    @cached_property
    def before(self) -> int:
        """How many of them lie before the part."""
        return sum(span.lo < self.owned[self.line.me].lo for span in self.spans)

    @cached_property
    def near(self) -> tuple[Near, ...]:
        """All that outputs read of them."""
        (kernel, stride, dilation), found = self.taps, []
        for out, (plane, span) in itertools.product(range(self.outputs), enumerate(self.spans)):
            start = self.first + out * stride
            j0 = max(0, -(-(span.lo - start) // dilation))
            j1 = min(kernel, (span.hi - 1 - start) // dilation + 1)
            if j1 > j0:
                at, size = start + j0 * dilation - span.lo, (j1 - j0 - 1) * dilation + 1
                found.append(Near(out, j0, j1 - j0, plane, at, size, size == span.size))
        readers = Counter(near.plane for near in found)
        return tuple(near._replace(is_all=near.is_all and readers[near.plane] == 1) for near in found)


class Halo(NamedTuple):
    """The planes a cut brought, one for each of its spans, and the pads to convolve them with."""

    cut: Cut
    planes: Sequence[torch.Tensor]
    pads: Pads

    def sides(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The planes before the part and behind it."""
        return self.planes[: self.cut.before], self.planes[self.cut.before :]


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
    d_halos = [Halo(halo.cut, [torch.zeros_like(plane) for plane in halo.planes], halo.pads) for halo in halos]
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
    if not before:
        return Posted(x, cut.owned, cut.wanted, cut.line)
    own = cut.owned[cut.line.me].lo

    def take(span: Interval) -> torch.Tensor:
        return strip(x, halos, cut.dim, span.lo - own, span.size)

    return Posted(x, cut.owned, cut.wanted, cut.line, take, _extended(x, before))


def post_back(x: torch.Tensor, d_halo: Halo, before: Sequence[Cut]) -> Posted:
    """Gradients of a cut's planes on their way home."""
    cut = d_halo.cut
    planes = dict(zip(cut.spans, d_halo.planes, strict=True))
    return Posted(x, cut.wanted, cut.owned, cut.line, planes.__getitem__, _extended(x, before) if before else None)


def arrived(posted: Posted, pads: Pads, cut: Cut, before: Sequence[Cut]) -> Halo:
    """The planes of an exchange, complete."""
    return Halo(cut, [piece for _, _, piece in posted.pieces()], _halo_pads(pads, before))


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
        for span in cut.spans:
            shape[cut.dim] = span.size
            planes.append(x.new_zeros(shape))
        halos.append(Halo(cut, planes, _halo_pads(pads, cuts[:level])))
    return halos


def again(cuts: Sequence[Cut], planes: Sequence[torch.Tensor], pads: Pads) -> list[Halo]:
    """Saved planes put together again."""
    rest = iter(planes)
    return [
        Halo(cut, list(itertools.islice(rest, len(cut.spans))), _halo_pads(pads, cuts[:level]))
        for level, cut in enumerate(cuts)
    ]


def _halo_pads(pads: Pads, before: Sequence[Cut]) -> Pads:
    """Planes are extended along the dims of earlier cuts, so there only the padding of the volume is left."""
    if not before:
        return pads
    edges = {cut.dim - 2: cut.edge for cut in before}
    return tuple(edges.get(i, pad) for i, pad in enumerate(pads))


@lru_cache(maxsize=4096)
def _flat(conv: Conv, pads: Pads, dim: int) -> tuple[Conv, Pads]:
    """Those of a convolution without `dim`."""
    return Conv(_without(conv.stride, dim), _without(conv.dilation, dim), conv.groups), _without(pads, dim)


@lru_cache(maxsize=4096)
def _one_plane(conv: Conv, pads: Pads, dim: int) -> tuple[Conv, Pads]:
    """Those of a convolution that gives one output along `dim`."""
    stride = (*conv.stride[: dim - 2], 1, *conv.stride[dim - 1 :])
    return Conv(stride, conv.dilation, conv.groups), (*pads[: dim - 2], (0, 0), *pads[dim - 1 :])


def _without(values: Sequence[Any], dim: int) -> tuple[Any, ...]:
    return (*values[: dim - 2], *values[dim - 1 :])


def _thin(part: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Any, dim: int) -> tuple[Any, ...]:
    """A slab that yields one output plane: a convolution with one dim less where a single tap reads it."""
    if weight.shape[dim] == 1 and weight.ndim > 3:
        return part.squeeze(dim), weight.squeeze(dim), *_flat(conv, pads, dim), True
    return part, weight, *_one_plane(conv, pads, dim), False


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
