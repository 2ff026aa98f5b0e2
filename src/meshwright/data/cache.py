"""Parts in the memory of one rank within a budget: which stay, which go to disk, which are read again.

The order of the steps is known, so what leaves memory is what is used latest (L. A. Belady, "A study of replacement
algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966: no policy misses less). A part that arrives
when memory is full and is itself the one used latest is not kept at all.

    bytes kept + bytes reserved for the pipeline + pages that wait for their next use ≤ budget, at every moment
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from meshwright.data.buffers import Recycled
from meshwright.data.spill import Spill

NEVER = 1 << 62  # the next use of a sample that no known step uses


class Uses:
    """Which step uses a sample next: a look ahead of `horizon` steps in the order, no further than step `last`."""

    def __init__(self, order: Callable[[int], Sequence[int]], first: int, last: int | None, horizon: int) -> None:
        self._order, self._upto, self._last, self._horizon = order, first, last, horizon
        self._steps: dict[int, deque[int]] = {}

    def after(self, sample: int, step: int) -> int:
        """The first use after `step`, `NEVER` if none is known. Asked for one sample in the order of its steps."""
        end = step + 1 + self._horizon
        while self._upto < (end if self._last is None else min(end, self._last)):
            for other in dict.fromkeys(self._order(self._upto)):
                self._steps.setdefault(other, deque()).append(self._upto)
            self._upto += 1
        steps = self._steps.get(sample, deque())
        while steps and steps[0] <= step:
            steps.popleft()
        return steps[0] if steps else NEVER

    def is_last(self, sample: int, step: int) -> bool:
        """Whether no step of the run uses the sample after `step`."""
        return self.after(sample, step) == NEVER and self._upto == self._last


@dataclass
class CacheStats:
    """Where parts came from, in parts and bytes, since the start."""

    from_memory: int = 0
    from_disk: int = 0
    from_source: int = 0
    source_bytes: int = 0  # packed
    spilled: int = 0
    spilled_bytes: int = 0
    dropped: int = 0  # left memory without a copy on disk, to be read again
    damaged: int = 0  # came back from disk with a wrong checksum and were read again


@dataclass
class _Kept:
    packed: Tensor
    next_use: int


class Cache:
    """Packed parts by sample number. Thread-safe; two threads never read the same part twice."""

    def __init__(self, budget_bytes: int, uses: Uses, spill: Spill | None = None) -> None:
        self.budget_bytes, self.stats = budget_bytes, CacheStats()
        self.peak_bytes = 0
        self._uses, self._spill = uses, spill
        self._kept: dict[int, _Kept] = {}
        self._busy: set[int] = set()  # being read or written
        self._kept_bytes = self._reserved_bytes = 0
        self._free = threading.Condition()
        self.pages = Recycled(lambda nbytes: self._held_bytes + nbytes <= budget_bytes)

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def _held_bytes(self) -> int:
        return self._kept_bytes + self._reserved_bytes + self.pages.free_bytes

    def reserve(self, nbytes: int) -> None:
        """Keep less, so that `nbytes` more are free for the pipeline; negative: give them back."""
        with self._free:
            self._reserved_bytes += nbytes
        if nbytes > 0:
            self._make_room()

    def get(self, sample: int, step: int, load: Callable[[], Tensor]) -> Tensor:
        """The part of `sample`, for `step`: from memory, from disk if its checksum is right, else from `load()`."""
        with self._free:
            while sample in self._busy:
                self._free.wait()
            kept = self._kept.get(sample)
            if kept is not None:
                self.stats.from_memory += 1
                kept.next_use = self._uses.after(sample, step)
                return kept.packed
            self._busy.add(sample)
        try:
            packed = self._from_disk(sample)
            if packed is None:
                packed = load()
                with self._free:
                    self.stats.from_source += 1
                    self.stats.source_bytes += packed.numel()
            with self._free:
                self._kept[sample] = _Kept(packed, self._uses.after(sample, step))
                self._kept_bytes += packed.numel()
                over = self._uses.is_last(sample, step)
        finally:
            with self._free:
                self._busy.discard(sample)
                self._free.notify_all()
        if over:
            with self._free:
                self._forget(sample)
        self._make_room()
        return packed

    def at_hand(self, sample: int, step: int) -> Tensor | None:
        """The part of `sample`, for `step`, if it is in memory."""
        with self._free:
            kept = self._kept.get(sample)
            if kept is None:
                return None
            self.stats.from_memory += 1
            kept.next_use = self._uses.after(sample, step)
            return kept.packed

    def _from_disk(self, sample: int) -> Tensor | None:
        if self._spill is None or sample not in self._spill:
            return None
        packed = self._spill.read(sample)
        with self._free:
            if packed is None:
                self.stats.damaged += 1
            else:
                self.stats.from_disk += 1
        return packed

    def _make_room(self) -> None:
        """Let go of what is used latest until the budget holds; what is not on disk yet is written there first."""
        while True:
            with self._free:
                if self._held_bytes > self.budget_bytes:
                    self.pages.drop()
                held = self._held_bytes
                if held <= self.budget_bytes or not self._kept:
                    self.peak_bytes = max(self.peak_bytes, held)
                    return
                sample = max(self._kept, key=lambda key: (self._kept[key].next_use, key))
                kept = self._forget(sample)
                if kept is None or self._spill is None or sample in self._spill:
                    self.stats.dropped += self._spill is None
                    continue
                self._busy.add(sample)
            written = self._spill.write(sample, kept.packed)
            with self._free:
                self.stats.spilled += written
                self.stats.spilled_bytes += kept.packed.numel() * written
                self.stats.dropped += not written
                self._busy.discard(sample)
                self._free.notify_all()

    def _forget(self, sample: int) -> _Kept | None:
        kept = self._kept.pop(sample, None)
        if kept is not None:
            self._kept_bytes -= kept.packed.numel()
        return kept

    def close(self) -> None:
        """Forget all parts, in memory and on disk."""
        with self._free:
            self._kept.clear()
            self._kept_bytes = 0
            self.pages.drop()
        if self._spill is not None:
            self._spill.close()
