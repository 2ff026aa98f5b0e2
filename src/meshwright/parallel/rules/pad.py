"""`F.pad` by reflection, replication and wrapping around, on split space.

An output position stands for one input position. The positions that a rank's outputs stand for are one interval
(reflect, replicate) or at most two (circular: the two ends), fetched once each. Constant padding has a rule of its
own, below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.exchange import Line
from meshwright.parallel.functions import function
from meshwright.parallel.rules.windows import enter, fetch_windows, nothing, picked, result_dtype
from meshwright.plan.geometry import Interval, chunks

_SOURCE: dict[str, Callable[[int, int], int]] = {
    "reflect": lambda at, size: abs(at) if at < size else 2 * (size - 1) - at,
    "replicate": lambda at, size: min(max(at, 0), size - 1),
    "circular": lambda at, size: at % size,
}


@lru_cache(maxsize=1024)
def _sources(mode: str, size: int, before: int, after: int, out: Interval) -> tuple[int, ...]:
    """The input position that each output stands for."""
    first = 0
    if mode == "circular":  # torch crops first and wraps around what is left; the other modes see the whole input
        first, size = max(0, -before), size + min(0, before) + min(0, after)
        before = max(0, before)
    return tuple(first + _SOURCE[mode](at - before, size) for at in range(out.lo, out.hi))


@lru_cache(maxsize=1024)
def _runs(sources: tuple[int, ...]) -> tuple[Interval, Interval]:
    """The positions as at most two intervals (the second often empty)."""
    used = sorted(set(sources))
    if not used:
        return Interval(0, 0), Interval(0, 0)
    breaks = [i for i in range(1, len(used)) if used[i] != used[i - 1] + 1]
    assert len(breaks) <= 1, f"padding reads {len(breaks) + 1} intervals"
    cut = breaks[0] if breaks else len(used)
    second = Interval(used[cut], used[-1] + 1) if breaks else Interval(0, 0)
    return Interval(used[0], used[cut - 1] + 1), second


def _padded(local: torch.Tensor, size: int, mode: str, before: int, after: int, line: Line) -> torch.Tensor:
    """This rank's outputs along a split dim."""
    tables = [_sources(mode, size, before, after, out) for out in chunks(size + before + after, line.ranks)]
    runs = [_runs(table) for table in tables]
    first = fetch_windows(local, size, [run[0] for run in runs], line)
    parts = [first.narrow(line.dim, 0, runs[line.me][0].size)]
    if any(run[1].size for run in runs):
        parts.append(fetch_windows(local, size, [run[1] for run in runs], line))
    window = torch.cat(parts, line.dim) if len(parts) > 1 else parts[0]
    held = [at for run in runs[line.me] for at in range(run.lo, run.hi)]
    if held == list(tables[line.me]):
        return window
    places = {at: i for i, at in enumerate(held)}
    index = torch.tensor([places[at] for at in tables[line.me]], dtype=torch.int64, device=local.device)
    return picked(window, line.dim, index)


@lru_cache(maxsize=1024)
def _shape(shape: tuple[int, ...], pad: tuple[int, ...], mode: str) -> tuple[int, ...]:
    """The global output shape by torch itself, without data; wrong arguments raise torch's own error."""
    return tuple(F.pad(torch.empty(shape, device="meta"), pad, mode).shape)


@function(F.pad)
def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Padding (cropping, where negative) of the last dims; `pad` counts from the last dim."""
    if mode not in _SOURCE:
        return NotImplemented
    pad = tuple(int(v) for v in pad)
    out_shape = _shape(tuple(input.shape), pad, mode)
    space, local = enter(input, f"pad mode={mode}")
    dtype = result_dtype(local, lambda one: F.pad(one, [0] * len(pad), mode))
    rest = list(pad)
    for pair in range(len(pad) // 2):
        dim = input.ndim - 1 - pair
        line = space.line(dim)
        if line is not None:
            local = _padded(local, space.shape[dim], mode, pad[2 * pair], pad[2 * pair + 1], line)
            rest[2 * pair] = rest[2 * pair + 1] = 0
    target = space.local_shape(out_shape)
    if 0 in target:
        local = nothing(local, target, lambda one: F.pad(one, [0] * len(pad), mode) if any(rest) else one)
    elif any(rest):
        local = F.pad(local, rest, mode)
    return space.done(local.to(dtype), out_shape)
