"""Closed forms of the bytes an operation may send: which positions of the input the owner of an output needs.

A `Stage` is one exchange: for each split dim, from a range of output positions to the input positions that they
depend on. Every rank must receive what it needs and does not own, once, forward; the gradients of the same
elements travel back. That sum, over all ranks, is the bound; it uses none of the library's own arithmetic but the
roles of the plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import meshwright as mw

Shape = tuple[int, ...]
Sizes = int | Sequence[int]  # one number for every spatial dim, or one for each
Needs = Callable[[int, range], Iterable[int]]  # (size of the input dim, output positions) -> input positions


def part(size: int, parts: int, index: int) -> range:
    """What part `index` owns: torch.chunk's arithmetic."""
    step = -(-size // parts)
    return range(min(size, index * step), min(size, (index + 1) * step))


@dataclass(frozen=True)
class Stage:
    """One exchange. `needs[i]` and `sizes[i]` are for dim `first + i`; `sizes` maps input size to output size."""

    needs: tuple[Needs, ...]
    sizes: tuple[Callable[[int], int], ...]
    first: int = 2

    def out(self, shape: Shape) -> Shape:
        new = list(shape)
        for i, size in enumerate(self.sizes):
            new[self.first + i] = size(shape[self.first + i])
        return tuple(new)

    def received(self, plan: mw.Plan, shape: Shape, layout: str | None) -> int:
        """Elements that all ranks together receive forward: one dim after the other, in the costliest order."""
        return max(
            self._received(plan, shape, layout, order) for order in itertools.permutations(range(len(plan.axes)))
        )

    def _received(self, plan: mw.Plan, shape: Shape, layout: str | None, order: Sequence[int]) -> int:
        out, total = self.out(shape), 0
        dims = plan.dims(len(shape), layout)
        for rank in range(plan.ranks):
            where = list(zip(dims, plan.axes, plan.coordinates(rank), strict=True))
            split = [(dim, axis.size, index) for dim, axis, index in where if dim is not None]
            extent = list(shape)
            for dim, parts, index in split:
                extent[dim] = len(part(shape[dim], parts, index))
            for step in order:
                dim, axis, index = where[step]
                if dim is None or not self.first <= dim < self.first + len(self.needs):
                    continue
                wanted = part(out[dim], axis.size, index)
                need = set(self.needs[dim - self.first](shape[dim], wanted)) if wanted else set()
                missing = len(need - set(part(shape[dim], axis.size, index)))
                extent[dim] = 1
                total += missing * math.prod(extent)
                extent[dim] = len(need)
        return total


@dataclass(frozen=True)
class Bound:
    """Stages in the order of the forward, plus `statistics` elements (sums, maxima) that every rank tells all others.

    The same bytes again for backward. `whole` counts inputs that every rank may see entirely (a flatten into
    features is a change of layout, not a window).
    """

    stages: tuple[Stage, ...] = ()  # `any_order`: independent of each other; the costliest order counts
    any_order: bool = False
    statistics: Callable[[Sequence[Shape]], int] | None = None
    whole: bool = False

    def bytes(self, plan: mw.Plan, shapes: Sequence[Shape], layout: str | None, itemsize: int) -> int:
        """Bytes sent forward and backward by all ranks together."""
        others = plan.ranks - 1
        orders = itertools.permutations(self.stages) if self.any_order else [self.stages]
        elements = max(_along(stages, plan, shapes[0], layout) for stages in orders)
        if self.statistics is not None:
            elements += plan.ranks * others * self.statistics(shapes)
        if self.whole:
            elements += others * math.prod(shapes[0])
        return 2 * elements * itemsize


def _along(stages: Sequence[Stage], plan: mw.Plan, shape: Shape, layout: str | None) -> int:
    """Elements received in a chain of exchanges, each on what the one before gives."""
    total = 0
    for stage in stages:
        total += stage.received(plan, shape, layout)
        shape = stage.out(shape)
    return total


def per_dim(value: Sizes, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _clip(lo: int, hi: int, size: int) -> range:
    return range(max(0, lo), max(0, lo, min(size, hi)))


def conv_out(n: int, k: int, s: int, left: int, right: int, d: int, ceil: bool = False) -> int:
    span = n + left + right - d * (k - 1) - 1
    out = (-(-span // s) if ceil else span // s) + 1
    if ceil and (out - 1) * s >= n + left:
        out -= 1  # torch: the last window must start inside the input or its left padding
    return out


def conv(ndim, k, s=1, p=0, d=1, ceil=False) -> Stage:
    """Convolution and pooling: output o reads inputs o·s − p … o·s − p + d·(k − 1)."""
    needs, sizes = [], []
    for kk, ss, pp, dd in zip(*(per_dim(v, ndim) for v in (k, s)), _pads(p, ndim, k, d), per_dim(d, ndim), strict=True):
        left, _ = pp
        needs.append(
            lambda n, out, kk=kk, ss=ss, left=left, dd=dd: _clip(
                out[0] * ss - left, out[-1] * ss - left + dd * (kk - 1) + 1, n
            )
        )
        sizes.append(lambda n, kk=kk, ss=ss, pp=pp, dd=dd: conv_out(n, kk, ss, *pp, dd, ceil))
    return Stage(tuple(needs), tuple(sizes))


def _pads(p, ndim, k, d) -> list[tuple[int, int]]:
    if p == "same":
        spans = [dd * (kk - 1) for kk, dd in zip(per_dim(k, ndim), per_dim(d, ndim), strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    if p == "valid":
        return [(0, 0)] * ndim
    assert not isinstance(p, str)
    return [(pp, pp) for pp in per_dim(p, ndim)]


def transposed(ndim, k, s=1, p=0, op=0, d=1) -> Stage:
    """Transposed: input i writes outputs i·s − p + d·j, so output o reads (o + p − d·(k − 1))/s … (o + p)/s."""
    needs, sizes = [], []
    for kk, ss, pp, oo, dd in zip(*(per_dim(v, ndim) for v in (k, s, p, op, d)), strict=True):
        needs.append(
            lambda n, out, kk=kk, ss=ss, pp=pp, dd=dd: _clip(
                -(-(out[0] + pp - dd * (kk - 1)) // ss), (out[-1] + pp) // ss + 1, n
            )
        )
        sizes.append(lambda n, kk=kk, ss=ss, pp=pp, oo=oo, dd=dd: (n - 1) * ss - 2 * pp + dd * (kk - 1) + oo + 1)
    return Stage(tuple(needs), tuple(sizes))


def adaptive(*out: int) -> Stage:
    """Adaptive pooling to m: output o reads inputs floor(o·n/m) … ceil((o + 1)·n/m)."""
    needs = tuple(lambda n, o, m=m: range(o[0] * n // m, -(-(o[-1] + 1) * n // m)) for m in out)
    return Stage(needs, tuple(lambda n, m=m: m for m in out))


def interpolate(linear: bool, *out: int) -> Stage:
    """Interpolation to m positions: the source is about o·n/m; linear modes read its two neighbours."""

    def needs(n: int, o: range, m: int) -> set[int]:
        found: set[int] = set()
        for position in o:
            if linear:
                half = max((position + 0.5) * n / m - 0.5, 0.0)
                found |= {min(n - 1, math.floor(half)), min(n - 1, math.floor(half) + 1)}
            else:
                found.add(min(n - 1, position * n // m))
        return found

    return Stage(
        tuple(lambda n, o, m=m: needs(n, o, m) for m in out),
        tuple(lambda n, m=m: m for m in out),
    )


def aligned(*out: int) -> Stage:
    """Linear interpolation with `align_corners`: source o·(n − 1)/(m − 1)."""

    def needs(n: int, o: range, m: int) -> set[int]:
        low = [position * (n - 1) // max(1, m - 1) for position in o]
        return {min(n - 1, source + step) for source in low for step in (0, 1)}

    return Stage(
        tuple(lambda n, o, m=m: needs(n, o, m) for m in out),
        tuple(lambda n, m=m: m for m in out),
    )


def moved(dim: int, sources: Callable[[int], Sequence[int | None]]) -> Stage:
    """A dim renumbered: `sources(n)[o]` is where output o comes from; None is a constant (pad, slice, flip, cat)."""

    def needs(n: int, out: range) -> list[int]:
        table = sources(n)
        return [source for o in out if (source := table[o]) is not None]

    return Stage((needs,), (lambda n: len(sources(n)),), first=dim)


def padded(dim: int, left: int, right: int, mode: str = "constant") -> Stage:
    """`F.pad` along one dim, every mode; negative widths crop."""

    def source(n: int, o: int) -> int | None:
        if 0 <= o < n:
            return o
        if mode == "reflect":
            return -o if o < 0 else 2 * (n - 1) - o
        if mode == "replicate":
            return min(max(o, 0), n - 1)
        return o % n if mode == "circular" else None

    return moved(dim, lambda n: [source(n, o) for o in range(-left, n + right)])


def sliced(dim: int, cut: slice) -> Stage:
    """`x[a:b:c]` along one dim: output o is position a + o·c; what lies between two of a rank travels along."""

    def needs(n: int, out: range) -> range:
        found = range(n)[cut][out[0] : out[-1] + 1]
        return range(found[0], found[-1] + 1)

    return Stage((needs,), (lambda n: len(range(n)[cut]),), first=dim)


def resampled(mode: str, sizes: Sequence[int], scales: Sequence[float | None], align: bool) -> Stage:
    """Interpolation with torch's coordinates: a factor that the user gave counts as it is, else n/m.

    A coordinate within 1e-6 of a whole number may fall to either side.
    """

    def needs(n: int, out: range, m: int, scale: float | None) -> set[int]:
        found: set[int] = set()
        ratio = 1.0 / scale if scale else n / m
        for o in out:
            if n == m and mode != "nearest-exact" and (mode == "linear" or not scale or len(sizes) == 2):
                found.add(o)
            elif mode == "linear":
                at = o * (n - 1) / max(1, m - 1) if align else max((o + 0.5) * ratio - 0.5, 0.0)
                low = {min(n - 1, max(0, math.floor(at + slip))) for slip in (-1e-6, 1e-6)}
                found |= low | {min(n - 1, at + 1) for at in low}
            else:
                at = (o + 0.5) * ratio if mode == "nearest-exact" else o * ratio
                found |= {min(n - 1, max(0, math.floor(at + slip))) for slip in (-1e-6, 1e-6)}
        return found

    pairs = list(zip(sizes, scales, strict=True))
    return Stage(
        tuple(lambda n, out, m=m, s=s: needs(n, out, m, s) for m, s in pairs),
        tuple(lambda n, m=m: m for m in sizes),
    )
