"""What this process has exchanged so far: seconds, bytes, messages. Differences of two readings give one step.

Every exchange adds here and to the record of the layer that caused it (see `meshwright.parallel.ledger`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Totals:
    """Sums over the life of this process. Bytes and messages count what this rank sends."""

    exchange_post_s: float = 0.0  # packing and posting of windows
    exchange_wait_s: float = 0.0  # waiting for neighbours' windows
    boundary_s: float = 0.0  # work on the planes at a cut
    reduction_s: float = 0.0  # waiting for gradient buckets and statistics
    sent_bytes: int = 0  # windows, statistics and gradients together
    reduced_bytes: int = 0  # the part of sent_bytes that is parameter gradients
    gathered_bytes: int = 0  # sent because an operation had no local rule
    messages: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> Totals:
        return Totals(**{f.name: getattr(self, f.name) for f in fields(self)})


totals = Totals()
