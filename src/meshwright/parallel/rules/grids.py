"""The windows of pooling: what they read, where torch's own operator fits them, and what each of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from meshwright.parallel.functions import tuple_of
from meshwright.parallel.rules.windows import Space
from meshwright.plan.geometry import Interval, chunks, reached


@dataclass(frozen=True)
class Grid:
    """The windows of one dim: kernel, stride, padding, dilation."""

    k: int
    s: int
    p: int
    d: int

    @property
    def reach(self) -> int:
        """Positions that one window spans."""
        return self.d * (self.k - 1) + 1

    def outputs(self, size: int, padding: int, ceil: bool) -> int:
        """How many windows the plain operator has on `size` positions (torch's `pooling_output_shape`)."""
        room = size + 2 * padding - self.reach
        count = (-(-room // self.s) if ceil else room // self.s) + 1
        return count - 1 if ceil and (count - 1) * self.s >= size + padding else count

    def window(self, out: Interval, size: int) -> tuple[Interval, int, int]:
        """The input that outputs `out` read, and how far they reach before and after it."""
        return reached(out, size, self.k, self.s, self.p, self.d)

    def fit(self, size: int, before: int, outputs: int, ceil: bool) -> tuple[int, int] | None:
        """Padding with which the plain operator on a window of `size` has our `outputs`, and how many it has before
        them; None where no padding does."""
        if size < self.reach:  # some plain operators refuse
            return None
        for padding in range(before, max(self.k // 2, self.p) + 1, self.s):
            drop = (padding - before) // self.s
            if self.outputs(size, padding, ceil) >= drop + outputs:
                return padding, drop
        return None


def grids_of(n: int, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[Grid]:
    """The windows of a pooling's arguments, dim by dim."""
    kernel = tuple_of(kernel, n)
    stride = kernel if stride is None or stride == [] or stride == () else tuple_of(stride, n)
    return [Grid(*v) for v in zip(kernel, stride, tuple_of(padding, n), tuple_of(dilation, n), strict=True)]


def far_dims(space: Space, out_shape: Sequence[int], grids: Sequence[Grid]) -> list[int]:
    """The dims along which some rank reads what another one owns."""
    found = []
    for i, grid in enumerate(grids):
        size, line = space.shape[i + 2], space.line(i + 2)
        if line is None:
            continue
        windows = (grid.window(out, size)[0] for out in chunks(out_shape[i + 2], line.ranks))
        owned = chunks(size, line.ranks)
        if any(w.size and w.meet(own) != w for w, own in zip(windows, owned, strict=True)):
            found.append(i)
    return found


@lru_cache(maxsize=4096)
def shares(grid: Grid, out: Interval, size: int, include_pad: bool) -> tuple[float, ...]:
    """For each output, the kernel's size over the number of positions that torch counts in its window."""
    found = []
    for index in range(out.lo, out.hi):
        lo = index * grid.s - grid.p
        hi = min(lo + grid.k, size + grid.p)
        found.append(grid.k / (hi - lo if include_pad else min(hi, size) - max(lo, 0)))
    return tuple(found)
