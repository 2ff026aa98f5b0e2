"""What is exchanged, and for whom: running totals of this process, and one ledger per parallelized module.

Every exchange adds to `totals` (differences of two readings give one step) and to the ledger of the module on
whose behalf it happened, under the layer and the operation that caused it.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field, fields

OUTSIDE = "(outside the module)"


@dataclass
class Totals:
    """Sums over the life of this process. Bytes and messages count what this rank sends."""

    exchange_post_s: float = 0.0  # packing and posting of windows
    exchange_wait_s: float = 0.0  # waiting for neighbours' windows and statistics
    boundary_s: float = 0.0  # work on the planes at a cut
    reduction_s: float = 0.0  # waiting for buckets of gradients
    sent_bytes: int = 0  # windows, statistics and gradients together
    reduced_bytes: int = 0  # the part of sent_bytes that is parameter gradients
    gathered_bytes: int = 0  # the part of sent_bytes for operations without a local rule
    messages: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> Totals:
        """A reading that does not move on."""
        return Totals(**{f.name: getattr(self, f.name) for f in fields(self)})


totals = Totals()


@dataclass
class Entry:
    """What one operation of one layer has sent since the module was parallelized."""

    layer: str
    op: str
    exchanged_bytes: int = 0
    gathered_bytes: int = 0
    messages: int = 0


@dataclass(eq=False)
class Ledger:
    """The record of one parallelized module; `strict` refuses what has no local rule. Compared by identity."""

    strict: bool = False
    seed: int = 0
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    calls: int = 0  # forward calls so far: the clock of the random streams
    by_filters: bool = False  # a convolution was split by filters, so outputs may be split by channels

    def __deepcopy__(self, memo: dict[int, object]) -> Ledger:
        return Ledger(strict=self.strict, seed=self.seed, calls=self.calls)

    def entry(self, layer: str, op: str) -> Entry:
        key = (layer, op)
        if key not in self.entries:
            self.entries[key] = Entry(layer, op)
        return self.entries[key]

    def gathered(self, layer: str, op: str, nbytes: int) -> None:
        """Note a gather; the first of each layer and op is told to the user, once."""
        if not nbytes:
            return
        entry = self.entry(layer, op)
        if not entry.gathered_bytes:
            warnings.warn(
                f"meshwright: {op} in layer {layer!r} has no split form; its inputs are gathered "
                f"({nbytes} bytes sent per rank and call). parallelize(..., strict=True) refuses instead.",
                GatherWarning,
                stacklevel=2,
            )
        entry.gathered_bytes += nbytes


class GatherWarning(UserWarning):
    """An operation was computed exactly, but by gathering its inputs on every rank."""


class _Where(threading.local):
    """The names of the modules whose forward runs now in this thread, outermost first, with their ledgers."""

    def __init__(self) -> None:
        self.stack: list[tuple[Ledger, str]] = []


where = _Where()


def layer() -> str:
    """The name of the innermost module that runs now."""
    return where.stack[-1][1] if where.stack else OUTSIDE


# Of tensors that no module made: their gathers are told all the same.
nobody = Ledger()


def sent(ledger: Ledger | None, place: tuple[str, str], nbytes: int, messages: int) -> None:
    """Count an exchange of `nbytes` in `messages` for `place` = (layer, op)."""
    totals.sent_bytes += nbytes
    totals.messages += messages
    if ledger is not None and messages:
        entry = ledger.entry(*place)
        entry.exchanged_bytes += nbytes
        entry.messages += messages
