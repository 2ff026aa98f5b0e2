"""Maximum, average and power-average pooling on split space, 1-D to 3-D.

Window of an output: [a, b) reads input [a s - p, (b - 1) s - p + d (k - 1) + 1), cut to the input. Whatever a window
reads beyond the input is left to the plain operator's own padding where its geometry allows (no copy), else padded
explicitly. Sizes follow torch's formula: with `ceil_mode` the last window must start inside the input or in the
padding before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.functions import function, tuple_of
from meshwright.parallel.pool_kernels import MOST_TAPS, Boxes, average
from meshwright.parallel.rules.edge_pool import EdgePool, edge_work
from meshwright.parallel.rules.grids import Grid, far_dims, grids_of, shares
from meshwright.parallel.rules.line_pool import LinePool, Windows
from meshwright.parallel.rules.windows import Space, enter, fetch_windows, nothing, raster, result_dtype, unravelled
from meshwright.parallel.tensor import wrap
from meshwright.plan.geometry import Interval, chunks, pools_early

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@lru_cache(maxsize=4096)
def _sizes(plain: Callable[..., Any], shape: tuple[int, ...], args: tuple[Any, ...]) -> tuple[int, ...]:
    """The global output shape by torch itself, without data; wrong arguments raise torch's own error."""
    return tuple(plain(torch.empty(shape, device="meta"), *args).shape)


def _pooled(
    space: Space,
    local: torch.Tensor,
    out_shape: Sequence[int],
    grids: Sequence[Grid],
    fill: float,
    plain: Callable[[torch.Tensor, tuple[int, ...], bool], tuple[torch.Tensor, ...]],
    single: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], list[Interval]]:
    """This rank's outputs of `plain(window, padding, ceil_mode)`, and where the window lies along each dim (explicit
    padding is part of it); without outputs there is the first alone, made by `single`: the operator on one element."""
    before, after, lows = [0] * len(grids), [0] * len(grids), [0] * len(grids)
    target = space.local_shape(out_shape)
    for i, grid in enumerate(grids):
        size, line = space.shape[i + 2], space.line(i + 2)
        if line is None:
            _, before[i], after[i] = grid.window(Interval(0, out_shape[i + 2]), size)
            continue
        windows = [grid.window(out, size) for out in chunks(out_shape[i + 2], line.ranks)]
        inside, before[i], after[i] = windows[line.me]
        lows[i] = inside.lo
        local = fetch_windows(local, size, [window for window, _, _ in windows], line)
    if 0 in target:
        return [nothing(local, target, single)], []

    def fits(ceil: bool) -> list[tuple[int, int] | None]:
        return [grid.fit(local.shape[i + 2], before[i], target[i + 2], ceil) for i, grid in enumerate(grids)]

    ceil = fits(False).count(None) > fits(True).count(None)
    chosen = fits(ceil)
    pads = [(0, 0) if fit else (before[i], after[i]) for i, fit in enumerate(chosen)]
    if any(map(any, pads)):
        local = F.pad(local, [end for pair in reversed(pads) for end in pair], value=fill)
    spans = [
        Interval(lo - pad[0], lo - pad[0] + size) for lo, pad, size in zip(lows, pads, local.shape[2:], strict=True)
    ]
    outs = list(plain(local, tuple(fit[0] if fit else 0 for fit in chosen), ceil))
    for i, fit in enumerate(chosen):
        drop = fit[1] if fit else 0
        if outs[0].shape[i + 2] != target[i + 2]:
            outs = [y.narrow(i + 2, drop, target[i + 2]) for y in outs]
    return outs, spans


def max_pool(
    n: int,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maximum pooling; among equal values the first in raster order gets the gradient, as in torch."""
    if input.ndim == n + 1:
        out = max_pool(n, input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return (out[0].squeeze(0), out[1].squeeze(0)) if return_indices else out.squeeze(0)
    grids = grids_of(n, kernel_size, stride, padding, dilation)
    args = tuple(zip(*((g.k, g.s, g.p, g.d) for g in grids), strict=True))
    out_shape = _sizes(_MAX[n], tuple(input.shape), (*args, ceil_mode))
    kernel, stride, _, dilation = args
    space, local = enter(input, "max_pool")

    def window(local: torch.Tensor) -> tuple[list[torch.Tensor], list[Interval]]:
        return _pooled(
            space,
            local,
            out_shape,
            grids,
            -math.inf,
            lambda window, pads, ceil: _tuple(_MAX[n](window, kernel, stride, pads, dilation, ceil, return_indices)),
            lambda one: _MAX[n](one, 1),
        )

    # halves would be rounded once for the strip and once for the rest
    wide = local.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(local.device.type)
    if wide and local.device.type == "cpu" and not (ceil_mode or return_indices):
        work = edge_work(space, out_shape, grids)
        if work is not None:
            return space.done(EdgePool.apply(local, work, lambda local: window(local)[0][0]), out_shape)
    outs, spans = window(local)
    y = space.done(outs[0], out_shape)
    if not return_indices:
        return y
    index = _positions(outs[1], spans, space, grids) if spans else outs[0].new_empty(outs[0].shape, dtype=torch.int64)
    return y, wrap(index, space.mesh, space.placements, out_shape, space.cause.ledger)


def _tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _positions(index: torch.Tensor, spans: Sequence[Interval], space: Space, grids: Sequence[Grid]) -> torch.Tensor:
    """Raster positions within a window as those in the whole space."""
    places = []
    for place, span, grid in zip(unravelled(index, [span.size for span in spans]), spans, grids, strict=True):
        at = place + span.lo  # where all is -inf it may be padding: torch names the first tap inside
        places.append(torch.where(at < 0, at % grid.d, at) if span.lo < 0 else at)
    return raster(places, space.shape[2:])


def avg_pool(
    n: int,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling: sums by the kernel's size, scaled at outputs whose window counts fewer positions."""
    if input.ndim == n + 1:
        given = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return avg_pool(n, input.unsqueeze(0), *given).squeeze(0)
    grids = grids_of(n, kernel_size, stride, padding, 1)
    kernel, strides, pads = zip(*((g.k, g.s, g.p) for g in grids), strict=True)
    options = (ceil_mode, count_include_pad, *([] if n == 1 else [divisor_override]))
    out_shape = _sizes(_AVG[n], tuple(input.shape), (kernel, strides, pads, *options))
    space, local = enter(input, "avg_pool")
    far = far_dims(space, out_shape, grids)
    sizes = zip(grids, input.shape[2:], out_shape[2:], strict=True)
    near = [i for i, (g, size, out) in enumerate(sizes) if i not in far and pools_early(g.k, g.s, size, out)]
    dtype = result_dtype(local, lambda one: _AVG[n](one, 1))
    if far and local.dtype == dtype and dtype in (torch.float32, torch.float64):
        # Sums over boxes are sums over lines: first where no other rank is needed, then less is left to send and lay
        # together; then along the one dim where others are. Halves would round in between.
        rest = [i for i in range(n) if i not in (near or far)]
        undivided = 1 if divisor_override else None

        def along(x: Any, dims: Sequence[int], override: int | None) -> Any:
            there = [(grid.k, grid.s, grid.p) if i in dims else (1, 1, 0) for i, grid in enumerate(grids)]
            if all(values == (1, 1, 0) for values in there):
                return x
            k, s, p = (list(values) for values in zip(*there, strict=True))
            return avg_pool(n, x, k, s, p, ceil_mode, count_include_pad, override)

        if near:
            return along(along(input, near, undivided), rest, divisor_override)
        if len(far) == 1 and grids[far[0]].k <= MOST_TAPS * grids[far[0]].s:
            y = _line_pooled(space, local, out_shape, far[0], grids, count_include_pad, divisor_override)
            return along(y, rest, undivided)
    divisor = divisor_override or math.prod(kernel)
    (y, *_), _ = _pooled(
        space,
        local,
        out_shape,
        grids,
        0.0,
        lambda window, p, ceil: (average(window.to(dtype), Boxes(kernel, strides, p, ceil, divisor)),),
        lambda one: average(one.to(dtype), Boxes((1,) * n, (1,) * n, (0,) * n, False, 1)),
    )
    if not divisor_override and y.numel():
        y = _scaled(space, y, out_shape, grids, count_include_pad)
    return space.done(y, out_shape)


def _line_pooled(
    space: Space,
    local: torch.Tensor,
    out_shape: Sequence[int],
    i: int,
    grids: Sequence[Grid],
    include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """Average pooling along dim `i` of space alone, which is split."""
    grid, line, size = grids[i], space.line(i + 2), space.shape[i + 2]
    assert line is not None
    shape = (*space.shape[: i + 2], out_shape[i + 2], *space.shape[i + 3 :])
    owned, outs = chunks(size, line.ranks), chunks(shape[i + 2], line.ranks)
    wanted = tuple(grid.window(out, size)[0] for out in outs)
    share = 1 / (divisor_override or grid.k)
    y = LinePool.apply(local, Windows(line, owned, wanted, outs, grid.k, grid.s, grid.p, share))
    if not divisor_override and y.numel():
        alone = [grid if j == i else Grid(1, 1, 0, 1) for j in range(len(grids))]
        y = _scaled(space, y, shape, alone, include_pad)
    return space.done(y, shape)


def _scaled(
    space: Space, y: torch.Tensor, out_shape: Sequence[int], grids: Sequence[Grid], include_pad: bool
) -> torch.Tensor:
    """`y` times the shares of all dims, where they are not 1."""
    factor: torch.Tensor | None = None
    for i, grid in enumerate(grids):
        line = space.line(i + 2)
        out = chunks(out_shape[i + 2], line.ranks)[line.me] if line else Interval(0, out_shape[i + 2])
        found = shares(grid, out, space.shape[i + 2], include_pad)
        if any(share != 1 for share in found):
            wide = torch.float64 if y.dtype == torch.float64 else torch.float32
            one = torch.tensor(found, dtype=wide, device=y.device).view(-1, *(1 for _ in grids[i + 1 :]))
            factor = one if factor is None else factor * one
    return y if factor is None else (y * factor).to(y.dtype)


def lp_pool(n: int, input: Any, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Any:
    """Power-average pooling, composed as torch composes it."""
    if norm_type == math.inf:
        return max_pool(n, input.abs(), kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == -math.inf:
        return -max_pool(n, -input.abs(), kernel_size, stride, 0, 1, ceil_mode)
    out = avg_pool(n, input.pow(norm_type), kernel_size, stride, 0, ceil_mode)
    positive = torch.sign(out) * torch.relu(torch.abs(out))
    return positive.mul(math.prod(tuple_of(kernel_size, n))).pow(1.0 / norm_type)


def _with_indices(n: int, *args: Any, **kwargs: Any) -> Any:
    """The forms that always return indices."""
    return max_pool(n, *args, **{**kwargs, "return_indices": True})


function(F.max_pool1d, torch.max_pool1d)(partial(max_pool, 1))
function(F.max_pool2d, torch.max_pool2d)(partial(max_pool, 2))
function(F.max_pool3d, torch.max_pool3d)(partial(max_pool, 3))
function(F.max_pool1d_with_indices, torch.max_pool1d_with_indices)(partial(_with_indices, 1))
function(F.max_pool2d_with_indices, torch._C._nn.max_pool2d_with_indices)(partial(_with_indices, 2))
function(F.max_pool3d_with_indices, torch._C._nn.max_pool3d_with_indices)(partial(_with_indices, 3))
function(F.avg_pool1d)(partial(avg_pool, 1))
function(F.avg_pool2d)(partial(avg_pool, 2))
function(F.avg_pool3d)(partial(avg_pool, 3))
function(F.lp_pool1d)(partial(lp_pool, 1))
function(F.lp_pool2d)(partial(lp_pool, 2))
function(F.lp_pool3d)(partial(lp_pool, 3))
