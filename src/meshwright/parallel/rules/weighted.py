"""Interpolation by fixed weights of many positions on split space: bicubic, and every mode with `antialias=True`.

These modes are separable. The weights of a split dim are asked of torch, which resamples unit vectors along one dim, so
coordinates, rounding and normalisation are its own. Each rank fetches the interval that its outputs read and adds up
the weighted positions. Whole dims go the same way: with antialias torch's own kernel is wrong for parts of width 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.exchange import Line
from meshwright.parallel.layout import splits
from meshwright.parallel.rules.windows import enter, fetch_windows, nothing, picked
from meshwright.plan.geometry import Interval, chunks

_ROWS = 256  # unit vectors resampled at once


@dataclass(frozen=True)
class _Kind:
    """How one dim is resampled: to `out` positions, by `scale` where torch takes the ratio from it."""

    mode: str
    antialias: bool
    align_corners: bool
    out: int
    scale: float | None

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1, 1, size] → [N, 1, 1, out]."""
        options: dict[str, Any] = {"mode": self.mode, "antialias": self.antialias, "align_corners": self.align_corners}
        if self.scale is None:
            return F.interpolate(x, size=(1, self.out), **options)
        return F.interpolate(x, scale_factor=(1.0, self.scale), recompute_scale_factor=False, **options)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training that follows
def _weights(kind: _Kind, size: int, dtype: torch.dtype) -> tuple[tuple[Interval, ...], torch.Tensor]:
    """For each output the interval that it reads, and [taps, out]: the weights from the interval's start on."""
    rows = []
    for lo in range(0, size, _ROWS):
        some = torch.zeros(min(_ROWS, size - lo), size, dtype=dtype)
        some[:, lo:].fill_diagonal_(1)
        rows.append(kind.plain(some[:, None, None]).flatten(1))
    matrix = torch.cat(rows)
    used = matrix != 0
    first = used.int().argmax(0)
    last = size - used.flip(0).int().argmax(0)
    taps = int((last - first).max())
    index = first + torch.arange(taps)[:, None]
    weights = matrix.gather(0, index.clamp(max=size - 1)).masked_fill_(index >= last, 0)
    return tuple(Interval(*pair) for pair in zip(first.tolist(), last.tolist(), strict=True)), weights


def _windows(kind: _Kind, size: int, dtype: torch.dtype, line: Line) -> list[Interval]:
    """What the outputs of each rank along `line` read."""
    spans, _ = _weights(kind, size, dtype)
    reads = [spans[out.lo : out.hi] for out in chunks(kind.out, line.ranks)]
    return [Interval(min(s.lo for s in read), max(s.hi for s in read)) if read else Interval(0, 0) for read in reads]


def _resampled(local: torch.Tensor, dim: int, kind: _Kind, size: int, base: int, out: Interval) -> torch.Tensor:
    """Outputs `out` along a dim of global `size`, of which `local` holds the positions from `base` on."""
    spans, weights = _weights(kind, size, local.dtype)
    first = torch.tensor([span.lo - base for span in spans[out.lo : out.hi]])
    shape = (-1, *(1 for _ in local.shape[dim + 1 :]))
    y: torch.Tensor | None = None
    for tap, row in enumerate(weights[:, out.lo : out.hi]):
        if not row.any():
            continue
        at = (first + tap).clamp(max=local.shape[dim] - 1).to(local.device)
        term = picked(local, dim, at) * row.to(local.device).view(shape)
        y = term if y is None else y + term
    assert y is not None, "weights of an output add up to 1"
    return y


def weighted(
    input: Any, size: Any, scale_factor: Any, mode: str, align_corners: bool | None, recompute: bool | None, alias: bool
) -> Any:
    """`F.interpolate` of a mode without a rule of its own; `alias` is torch's `antialias`."""
    options: dict[str, Any] = {"mode": mode, "align_corners": align_corners, "antialias": alias}
    by: dict[str, Any] = {"scale_factor": scale_factor, "recompute_scale_factor": recompute}
    meta = torch.empty(tuple(input.shape), device="meta")
    out_shape = tuple(F.interpolate(meta, size=size, **by, **options).shape)  # wrong arguments raise torch's errors
    given = scale_factor if isinstance(scale_factor, list | tuple) else (scale_factor, scale_factor)
    factors = [None if recompute or f is None else float(f) for f in given]
    space, local = enter(input, f"interpolate mode={mode}")
    dtype = local.dtype
    if dtype in (torch.bfloat16, torch.float16):
        local = local.float()  # as torch accumulates
    if not splits(space.placements):
        return space.done(F.interpolate(local, size=size, **by, **options).to(dtype), out_shape)
    work: list[tuple[int, _Kind, int, Interval]] = []
    for i, out in enumerate(out_shape[2:]):  # all windows before any dim grows
        kind, line = _Kind(mode, alias, bool(align_corners), out, factors[i]), space.line(i + 2)
        work.append((i + 2, kind, 0, Interval(0, out)))
        if line is not None:
            windows = _windows(kind, space.shape[i + 2], local.dtype, line)
            local = fetch_windows(local, space.shape[i + 2], windows, line)
            work[-1] = i + 2, kind, windows[line.me].lo, chunks(out, line.ranks)[line.me]
    target = space.local_shape(out_shape)
    if 0 in target:
        return space.done(nothing(local, target, lambda one: one).to(dtype), out_shape)
    for dim, kind, base, part in work:
        local = _resampled(local, dim, kind, space.shape[dim], base, part)
    return space.done(local.to(dtype), out_shape)
