"""Work that couples channels and rearranges them with space: pixel shuffles, channel shuffle, local response norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.functions import function, gathered
from meshwright.parallel.rules.windows import enter, fetch_windows, nothing
from meshwright.plan.geometry import Interval, chunks


def _local(op: str, input: Any, plain: Callable[[torch.Tensor], torch.Tensor], one: Any = None) -> Any:
    """`plain` on the local part, channels made whole; the shape stays. `one` is `plain` for a single channel."""
    space, local = enter(gathered(input, [1], op), op)
    y = plain(local) if local.numel() else nothing(local, local.shape, one or plain)
    return space.done(y, space.shape)


@function(F.channel_shuffle, torch.native_channel_shuffle)
def channel_shuffle(input: Any, groups: int) -> Any:
    """Local: channels are whole."""
    return _local("channel_shuffle", input, lambda x: F.channel_shuffle(x, groups), lambda one: one)


@function(F.local_response_norm)
def local_response_norm(input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Any:
    """Local: the sums run over channels."""
    return _local("local_response_norm", input, lambda x: F.local_response_norm(x, size, alpha, beta, k))


def _shuffled(op: str, input: Any, out_shape: Sequence[int], plain: Any, factor: int, up: bool) -> Any:
    """Space and channels exchanged by `factor`: output [a, b) reads input [a / r, b / r) or [a r, b r)."""
    space, local = enter(gathered(input, [input.ndim - 3], op), op)
    target, crops = space.local_shape(out_shape), []
    for dim in (input.ndim - 2, input.ndim - 1):
        line = space.line(dim)
        if line is None:
            continue
        outs = chunks(out_shape[dim], line.ranks)
        if up:
            windows = [Interval(out.lo // factor, -(-out.hi // factor)) if out.size else out for out in outs]
        else:
            windows = [Interval(out.lo * factor, out.hi * factor) for out in outs]
        local = fetch_windows(local, space.shape[dim], windows, line)
        if up:
            crops.append((dim, outs[line.me].lo - factor * windows[line.me].lo))
    if 0 in target:
        return space.done(nothing(local, target, lambda one: one), out_shape)
    y = plain(local if local.ndim == 4 else local.contiguous(), factor)  # torch refuses channels_last_3d
    for dim, first in crops:
        y = y.narrow(dim, first, target[dim])
    return space.done(y, out_shape)


@function(F.pixel_shuffle)
def pixel_shuffle(input: Any, upscale_factor: int) -> Any:
    """[..., C r², H, W] → [..., C, H r, W r]. Sends only where chunks of the output do not begin at a block."""
    shape, r = tuple(input.shape), upscale_factor
    if len(shape) < 3 or r < 1 or shape[-3] % (r * r):
        raise RuntimeError(f"pixel_shuffle: shape {shape} has no channels divisible by the square of {r}")
    out_shape = (*shape[:-3], shape[-3] // (r * r), shape[-2] * r, shape[-1] * r)
    return _shuffled("pixel_shuffle", input, out_shape, F.pixel_shuffle, r, True)


@function(F.pixel_unshuffle)
def pixel_unshuffle(input: Any, downscale_factor: int) -> Any:
    """[..., C, H r, W r] → [..., C r², H, W]. Sends only where chunks of the output do not begin at a block."""
    shape, r = tuple(input.shape), downscale_factor
    if len(shape) < 3 or r < 1 or shape[-2] % r or shape[-1] % r:
        raise RuntimeError(f"pixel_unshuffle: height and width of {shape} are not divisible by {r}")
    out_shape = (*shape[:-3], shape[-3] * r * r, shape[-2] // r, shape[-1] // r)
    return _shuffled("pixel_unshuffle", input, out_shape, F.pixel_unshuffle, r, False)
