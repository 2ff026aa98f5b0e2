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


def chunks(size: int, parts: int) -> tuple[Interval, ...]:
    """The intervals of all parts, in order."""
    return tuple(chunk(size, parts, index) for index in range(parts))


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
                span = own.meet(want)
                if span.size:
                    yield Transfer(source, target, span)

    return tuple(pieces())
