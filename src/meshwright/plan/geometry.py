"""Who owns which interval of a split dim: pure arithmetic, no communication.

Shards follow `torch.chunk` (and so DTensor): `n` elements over `parts` give chunks of `ceil(n / parts)`; the
last ones may be shorter or empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Interval(NamedTuple):
    """A half-open range `[lo, hi)` of positions along one dim."""

    lo: int
    hi: int

    @property
    def size(self) -> int:
        return self.hi - self.lo

    def meet(self, other: Interval) -> Interval:
        """The part common to both; empty (`hi == lo`) where they do not touch."""
        lo = max(self.lo, other.lo)
        return Interval(lo, max(lo, min(self.hi, other.hi)))


@lru_cache(maxsize=65536)
def chunk(size: int, parts: int, index: int) -> Interval:
    """The interval of `range(size)` that part `index` of `parts` owns."""
    step = -(-size // parts)
    lo = min(size, index * step)
    return Interval(lo, min(size, lo + step))


@lru_cache(maxsize=65536)
def chunks(size: int, parts: int) -> tuple[Interval, ...]:
    """The intervals of all parts, in order."""
    return tuple(chunk(size, parts, index) for index in range(parts))


def window(out: Interval, size: int, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """The positions inside `range(size)` that the outputs `out` of a convolution or pooling read.

    [a, b) reads [a s - p, (b - 1) s - p + d (k - 1) + 1), cut to the input; no outputs read nothing.
    """
    return reached(out, size, kernel, stride, padding, dilation)[0]


def reached(
    out: Interval, size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Interval, int, int]:
    """`window`, and how many positions before and after the input are read (all before, if none is inside)."""
    if not out.size:
        return Interval(0, 0), 0, 0
    lo, hi = out.lo * stride - padding, (out.hi - 1) * stride - padding + dilation * (kernel - 1) + 1
    inside = Interval(lo, hi).meet(Interval(0, size))
    return (inside, inside.lo - lo, hi - inside.hi) if inside.size else (Interval(0, 0), hi - lo, 0)


def pools_early(kernel: int, stride: int, size: int, out: int) -> bool:
    """Whether average pooling sums along a dim that needs no other rank before it exchanges: then less is left to send
    (padding may make `out` larger than `size`)."""
    return (kernel > 1 or stride > 1) and out <= size


@dataclass(frozen=True)
class Transfer:
    """Global positions `span` of a dim, owned by part `source`, needed by part `target`."""

    source: int
    target: int
    span: Interval


@lru_cache(maxsize=65536)
def transfers(owned: tuple[Interval, ...], wanted: tuple[Interval, ...]) -> tuple[Transfer, ...]:
    """Every non-empty piece that part `target` wants and part `source` owns, itself included, in one fixed order.

    Each rank computes the same list, so sends and receives pair up without any negotiation.
    """

    def pieces() -> Iterator[Transfer]:
        for target, want in enumerate(wanted):
            for source, own in enumerate(owned):
                if own.lo < want.hi and want.lo < own.hi:  # few of hundreds of ranks meet
                    span = own.meet(want)
                    if span.size:
                        yield Transfer(source, target, span)

    return tuple(pieces())
