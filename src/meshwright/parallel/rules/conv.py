"""Convolution on split space, any kernel, stride, dilation, padding and groups.

Window: output [a, b) reads input [a s - p, (b - 1) s - p + d (k - 1) + 1). Where few output planes read beyond the
cut, the exchange hides behind the local work (`halo_conv`); else the window is fetched whole first. The choice is
each rank's own: what travels is the same. Where weights outnumber activations it is split by filters (`filters.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.parallel.comm import Cause
from meshwright.parallel.decided import decided
from meshwright.parallel.exchange import Line
from meshwright.parallel.functions import (
    autocast,
    cause_for,
    function,
    gathered,
    meshed,
    tuple_of,
    whole_placements,
)
from meshwright.parallel.kernels import as_matrix
from meshwright.parallel.layout import axis_of, local_shape, split_axes
from meshwright.parallel.parts import laid, to_local
from meshwright.parallel.redistribute import replicate
from meshwright.parallel.rules.filters import Filters, by_filters
from meshwright.parallel.rules.halo import Cut
from meshwright.parallel.rules.halo_conv import SpatialConv, Work
from meshwright.parallel.rules.lines import are_lines
from meshwright.parallel.signature import Conv, Signature, signature
from meshwright.parallel.tensor import Layout
from meshwright.plan.geometry import Interval, chunks, reached

WIDE_PLANE = 64  # outputs in a plane, of all samples: then the planes of a window cost more than the weight
MAX_THIN = 8  # more output planes than this near a cut: one window is cheaper than plane by plane


Settings = tuple[tuple[int, ...], str | tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


@function(torch.conv1d, torch.conv2d, torch.conv3d)
def conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """Convolution of any kernel, stride, padding, dilation and groups; 1-D to 3-D."""
    x, weight, bias = meshed(input, weight, bias)
    shape = tuple(weight._spec.tensor_meta.shape)
    n = len(shape) - 2
    if len(x._spec.tensor_meta.shape) == n + 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    try:
        settings = _settings(stride, padding, dilation, groups, n)
    except TypeError:  # lists
        settings = _settings.__wrapped__(stride, padding, dilation, groups, n)
    cause, filters = cause_for("convolution", x, weight), by_filters(x._spec, weight._spec, groups)
    if filters is not None:
        w, b = filters.part(weight), None if bias is None else filters.part(bias)
        x, w, b = autocast(x, w, b)
        layout, _, work = _planned(x._spec, cause, filters, shape, settings, signature(x._local_tensor), signature(w))
        return laid(filters.convolved(x, w, b, shape[0], work, cause), layout, cause.ledger)
    x, weight, bias = autocast(x, weight, bias)
    x = gathered(x, [1], "convolution")
    weight, bias = replicate(weight), None if bias is None else replicate(bias)
    local, held = to_local(x), weight._local_tensor
    layout, axes, work = _planned(x._spec, cause, None, shape, settings, signature(local), signature(held))
    w, b = to_local(weight, axes), None if bias is None else to_local(bias, axes)
    return laid(SpatialConv.apply(local, w, b, work), layout, cause.ledger)


@lru_cache(maxsize=4096)
def _settings(stride: Any, padding: Any, dilation: Any, groups: int, n: int) -> Settings:
    padding = padding if isinstance(padding, str) else tuple_of(padding, n)
    return tuple_of(stride, n), padding, tuple_of(dilation, n), groups


@decided(2)
def _planned(
    x: DTensorSpec,
    cause: Cause,
    filters: Filters | None,
    weight_shape: tuple[int, ...],
    settings: Settings,
    local: Signature,
    weight: Signature,
) -> tuple[Layout, tuple[int, ...], Work]:
    """Where the result lies, the axes along which ranks compute on different data, and the work of this rank."""
    mesh, shape, placements = x.mesh, tuple(x.shape), whole_placements(x)
    out = placements
    if filters is not None:
        placements, out = filters.placements(placements)
    stride, padding, dilation, groups = settings
    kernel, n = weight_shape[2:], len(weight_shape) - 2
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        if any(s != 1 for s in stride):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(p, p) for p in tuple_of(0 if isinstance(padding, str) else padding, n)]
    if shape[1] != weight_shape[1] * groups:
        raise RuntimeError(
            f"convolution: the input {tuple(shape)} has {shape[1]} channels, the weight {tuple(weight_shape)} with "
            f"groups={groups} expects {weight_shape[1] * groups}"
        )
    sizes_out = [(shape[i + 2] + sum(ends[i]) - reach[i] - 1) // stride[i] + 1 for i in range(n)]
    if min(sizes_out) < 1:
        raise RuntimeError(
            f"convolution: kernel {tuple(kernel)} with dilation {dilation} exceeds the padded input {tuple(shape)}"
        )
    out_shape = (shape[0], weight_shape[0], *sizes_out)
    local_out = local_shape(mesh, placements, out_shape)[2:]
    cuts: list[Cut] = []
    for i in reversed(range(n)):  # the outermost dim last: its planes lie together in memory
        axis = axis_of(placements, i + 2)
        if axis is not None:
            line = Line(mesh, axis, i + 2, cause)
            args = (shape[i + 2], kernel[i], stride[i], dilation[i], ends[i][0])
            cuts.append(_cut(line, *args, chunks(sizes_out[i], line.ranks)))
    pads, constants = list(ends), Conv(stride, dilation, groups)
    light = _is_light(local, weight, local_out, cuts)
    light = light and not as_matrix(local, weight, constants, local_out, "weight")
    hidden = light and all(_is_thin(cut, stride[cut.dim - 2]) for cut in cuts)
    for cut in cuts:
        have, want = cut.owned[cut.line.me], cut.wanted[cut.line.me]
        before, after = cut.edge
        pads[cut.dim - 2] = (before + have.lo - want.lo, after + want.hi - have.hi) if hidden else cut.edge
    lines = hidden and are_lines(local, constants)
    work = Work(constants, tuple(pads), tuple(local_out), tuple(cuts), hidden, lines)
    return Layout(mesh, out, out_shape), split_axes(placements), work


def _cut(line: Line, size: int, k: int, s: int, d: int, p: int, outs: tuple[Interval, ...]) -> Cut:
    """The geometry of one split dim: `outs` are the output chunks of the ranks along the line."""
    windows = [reached(out, size, k, s, p, d) for out in outs]
    inside, before, after = windows[line.me]
    wanted = tuple(window[0] for window in windows)
    first, outputs = inside.lo - before, outs[line.me].size
    return Cut(line, chunks(size, line.ranks), wanted, first, outputs, (before, after), (k, s, d))


def _is_light(local: Signature, weight: Signature, outputs: tuple[int, ...], cuts: Sequence[Cut]) -> bool:
    """Whether planes are better convolved by themselves, for which the weight is reordered anew, than laid next to the
    part, which is copied for that and computed with their number of planes more. In halves always: torch's weight
    gradient of some such windows holds memory that nobody wrote."""
    if local.dtype in (torch.bfloat16, torch.float16) or weight.numel() <= local.numel():
        return True
    return all(local.shape[0] * math.prod(outputs) >= WIDE_PLANE * outputs[cut.dim - 2] for cut in cuts)


def _is_thin(cut: Cut, stride: int) -> bool:
    """Whether few enough output planes of this rank read neighbours' planes to add them one by one."""
    own, want = cut.owned[cut.line.me], cut.wanted[cut.line.me]
    if not cut.outputs or not own.meet(want).size:
        return False
    left, right = max(0, own.lo - want.lo), max(0, want.hi - own.hi)
    return -(-left // stride) + -(-right // stride) <= MAX_THIN
