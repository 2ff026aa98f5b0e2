"""Interpolation (`F.interpolate`, `nn.Upsample`) on split space: nearest, nearest-exact and linear, 1-D to 3-D.

Along a split dim each output reads one (nearest) or two (linear) input positions, given by global coordinates as torch
computes them. Only positions that some output reads travel. The windows of all split dims are fetched first, then these
dims are resampled one by one; what the plain operator can do on a window (integer factors) is left to it, with the dims
that are whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.exchange import Fetch, Line
from meshwright.parallel.functions import function
from meshwright.parallel.rules.adaptive import adaptive_avg_pool
from meshwright.parallel.rules.weighted import weighted
from meshwright.parallel.rules.windows import Space, enter, nothing, picked
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_PLAIN = {
    ("nearest", 1): aten.upsample_nearest1d.default,
    ("nearest", 2): aten.upsample_nearest2d.default,
    ("nearest", 3): aten.upsample_nearest3d.default,
    ("nearest-exact", 1): aten._upsample_nearest_exact1d.default,
    ("nearest-exact", 2): aten._upsample_nearest_exact2d.default,
    ("nearest-exact", 3): aten._upsample_nearest_exact3d.default,
    ("linear", 1): aten.upsample_linear1d.default,
    ("linear", 2): aten.upsample_bilinear2d.default,
    ("linear", 3): aten.upsample_trilinear3d.default,
}


@dataclass(frozen=True)
class Sampling:
    """One dim from `size` to `out` positions. `scale` is the user's factor where torch takes the ratio from it."""

    mode: str  # "nearest", "nearest-exact" or "linear"
    size: int
    out: int
    scale: float | None
    align_corners: bool
    double: bool  # coordinates in fp64, as torch computes them for fp64 input; else in fp32
    dims: int  # of space: torch 2.13.0 leaves a dim of unchanged size alone in 2-D, whatever the factor, else not


@dataclass(frozen=True)
class Taps:
    """The positions that outputs read, as indices into `used`, the ascending list of all positions that are read."""

    used: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    weight: torch.Tensor  # of `high`


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # kept for training that follows
def _taps(s: Sampling) -> Taps:
    """The taps of all outputs (torch, aten/src/ATen/native/UpSample.h)."""
    dtype = torch.float64 if s.double else torch.float32
    if s.mode != "linear":  # torch's own choice of the nearest, asked of a ramp
        ramp = torch.arange(s.size, dtype=torch.float64 if s.double or s.size > 2**24 else dtype)
        ones = [1] * (s.dims - 1)
        low = _PLAIN[s.mode, s.dims](ramp.view(1, 1, -1, *ones), [s.out, *ones], s.scale, *(None for _ in ones))
        low = low.view(-1).long()
        high, weight = low, torch.zeros(s.out, dtype=dtype)
    elif s.size == s.out:
        low = high = torch.arange(s.size)
        weight = torch.zeros(s.out, dtype=dtype)
    else:
        index = torch.arange(s.out, dtype=dtype)
        if s.align_corners:
            source = index * torch.tensor((s.size - 1) / (s.out - 1) if s.out > 1 else 0.0, dtype=dtype)
        else:
            ratio = torch.tensor(1.0 / s.scale if s.scale else s.size / s.out, dtype=dtype)
            source = ((index + 0.5) * ratio - 0.5).clamp(min=0)
        low = source.long().clamp(max=s.size - 1)
        high, weight = (low + 1).clamp(max=s.size - 1), (source - low).clamp(0, 1)
    used, places = torch.cat([low, high]).unique(return_inverse=True)
    low, high = places.view(2, -1)
    return Taps(tuple(used.tolist()), tuple(low.tolist()), tuple(high.tolist()), weight)


def _window(local: torch.Tensor, s: Sampling, taps: Taps, line: Line) -> tuple[torch.Tensor, Interval]:
    """The used positions that this rank's outputs read, and which (as an interval of indices into `used`)."""
    positions = torch.tensor(taps.used)
    have = chunks(s.size, line.ranks)
    bounds = [int(torch.searchsorted(positions, own.lo)) for own in have] + [len(taps.used)]
    held = tuple(Interval(*pair) for pair in itertools.pairwise(bounds))
    own = have[line.me]
    if len(taps.used) < s.size:
        mine = positions[held[line.me].lo : held[line.me].hi] - own.lo
        local = picked(local, line.dim, mine.to(local.device))
    wanted = tuple(
        Interval(taps.low[out.lo], taps.high[out.hi - 1] + 1) if out.size else Interval(home.lo, home.lo)
        for out, home in zip(chunks(s.out, line.ranks), held, strict=True)
    )
    if wanted != held:
        local = Fetch.apply(local, held, wanted, line)
    return local, wanted[line.me]


@dataclass(frozen=True)
class _Rest:
    """What the plain operator still does along a dim: to `out` positions by `scale`, of which [drop, drop + keep)."""

    out: int
    scale: float | None
    drop: int
    keep: int


def _resample(local: torch.Tensor, s: Sampling, window: Interval, line: Line) -> tuple[torch.Tensor, _Rest]:
    """Resample the window of a split dim, or leave it to the plain operator where that can."""
    taps = _taps(s)
    out, dim, size = chunks(s.out, line.ranks)[line.me], line.dim, window.size
    factor = s.out // s.size
    if s.mode == "linear" and s.out == factor * s.size and not s.align_corners and s.scale in (None, factor):
        return local, _Rest(factor * size, None, out.lo - factor * window.lo, out.size)
    low = torch.tensor(taps.low[out.lo : out.hi], device=local.device) - window.lo
    if s.mode != "linear":
        if tuple(low.tolist()) != _nearest(s, size, out.size):
            local = picked(local, dim, low)
        return local, _Rest(out.size, None, 0, out.size)
    high = torch.tensor(taps.high[out.lo : out.hi], device=local.device) - window.lo
    weight = taps.weight[out.lo : out.hi].to(local.device, local.dtype).view(-1, *(1 for _ in local.shape[dim + 1 :]))
    local = picked(local, dim, low) * (1 - weight) + picked(local, dim, high) * weight
    return local, _Rest(out.size, None, 0, out.size)


@lru_cache(maxsize=1024)
def _nearest(s: Sampling, size: int, out: int) -> tuple[int, ...]:
    """The positions that the plain operator picks on a window of `size`."""
    taps = _taps(Sampling(s.mode, size, out, None, False, s.double, s.dims))
    return tuple(taps.used[at] for at in taps.low)


def _plain(mode: str, local: torch.Tensor, rests: Sequence[_Rest], align_corners: bool) -> torch.Tensor:
    out = [rest.out for rest in rests]
    if out == list(local.shape[2:]) and all(rest.scale is None for rest in rests):
        return local
    options = (align_corners,) if mode == "linear" else ()
    y: torch.Tensor = _PLAIN[mode, len(rests)](local, out, *options, *(rest.scale for rest in rests))
    for i, rest in enumerate(rests):
        if rest.keep != rest.out:
            y = y.narrow(i + 2, rest.drop, rest.keep)
    return y


def _outputs(input: Any, size: Any, scale_factor: Any, recompute: bool | None) -> tuple[list[int], list[float | None]]:
    """Output sizes, and the factors where torch computes coordinates from them."""
    n = input.ndim - 2
    if (size is None) == (scale_factor is None):
        raise ValueError("interpolate: give either size or scale_factor, not both and not neither")
    if size is not None:
        if recompute:
            raise ValueError("recompute_scale_factor is not meaningful with an explicit size.")
        sizes = [int(v) for v in size] if isinstance(size, Sequence) else [int(size)] * n
        factors: list[float | None] = [None] * n
    else:
        given = [float(v) for v in scale_factor] if isinstance(scale_factor, Sequence) else [float(scale_factor)] * n
        sizes = [math.floor(length * factor) for length, factor in zip(input.shape[2:], given, strict=False)]
        factors = [None if recompute else factor for factor in given]
    if len(sizes) != n or len(factors) != n:
        raise ValueError(f"interpolate: {tuple(input.shape)} has {n} spatial dims, {size or scale_factor} was given")
    if min(sizes, default=1) < 1 or 0 in input.shape[2:]:
        raise RuntimeError(f"interpolate: from {tuple(input.shape[2:])} to {sizes}: sizes must be positive")
    return sizes, factors


@function(F.interpolate)
def interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Resampling to `size`, or by `scale_factor`. Area is adaptive; bicubic and antialias are in `weighted`."""
    n = input.ndim - 2
    if mode in ("nearest", "nearest-exact", "area") and align_corners is not None:
        raise ValueError(f"interpolate: align_corners has no meaning for mode={mode!r}")
    linear = mode == _MODES.get(n)
    if antialias or not (linear or mode in ("nearest", "nearest-exact", "area")):
        return weighted(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    sizes, factors = _outputs(input, size, scale_factor, recompute_scale_factor)
    if mode == "area":
        return adaptive_avg_pool(n, input, sizes)
    kind, aligned = "linear" if linear else mode, bool(align_corners)
    space, local = enter(input, "interpolate")
    return space.done(_local(space, local, kind, sizes, factors, aligned), (*space.shape[:2], *sizes))


def _local(
    space: Space,
    local: torch.Tensor,
    kind: str,
    sizes: Sequence[int],
    factors: Sequence[float | None],
    aligned: bool,
) -> torch.Tensor:
    """This rank's part of the result."""
    dtype, rests, cuts = local.dtype, [], []
    for i, (out, factor) in enumerate(zip(sizes, factors, strict=True)):  # all windows before any dim grows
        rests.append(_Rest(out, factor, 0, out))
        line = space.line(i + 2)
        if line is not None:
            sampling = Sampling(kind, space.shape[i + 2], out, factor, aligned, dtype == torch.float64, len(sizes))
            local, window = _window(local, sampling, _taps(sampling), line)
            cuts.append((i, sampling, window, line))
    target = space.local_shape((*space.shape[:2], *sizes))
    if 0 in target:
        return nothing(local, target, lambda one: one)
    if cuts and kind == "linear" and dtype in (torch.bfloat16, torch.float16):
        local = local.float()  # torch rounds once, after all dims
    for i, sampling, window, line in cuts:
        local, rests[i] = _resample(local, sampling, window, line)
    return _plain(kind, local, rests, aligned).to(dtype)
