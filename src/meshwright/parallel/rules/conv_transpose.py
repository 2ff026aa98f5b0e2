"""Transposed convolution on split space.

Window: output [a, b) reads input [ceil((a + p - d (k - 1)) / s), floor((b - 1 + p) / s) + 1). For kernel = stride
(the U-Net's) chunks line up and nothing is sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.exchange import Line, fetch
from meshwright.parallel.functions import (
    as_mesh,
    autocast,
    cause_for,
    function,
    gathered,
    mesh_of,
    placements_of,
    tuple_of,
)
from meshwright.parallel.guards import unreliable
from meshwright.parallel.kernels import memory_format, widened
from meshwright.parallel.layout import axis_of, local_shape, owned, split_axes
from meshwright.parallel.mesh import sizes
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import replicate
from meshwright.parallel.rules.conv import conv
from meshwright.parallel.signature import Conv
from meshwright.plan.geometry import Interval, chunks


@function(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Transposed convolution; output positions beyond the last window hold the bias alone."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = (as_mesh(v, mesh) for v in (input, weight, bias))
    n = weight.ndim - 2
    if x.ndim == n + 1:
        return conv_transpose(x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation).squeeze(
            0
        )
    x, weight, bias = autocast(x, weight, bias)
    native: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]
    stride, dilation, padding = tuple_of(stride, n), tuple_of(dilation, n), tuple_of(padding, n)
    extra = tuple_of(output_padding, n)
    x = gathered(x, [1], "conv_transpose")
    weight, bias = replicate(weight), None if bias is None else replicate(bias)
    placements, shape = placements_of(x), tuple(x.shape)
    cause = cause_for("conv_transpose", x, weight)
    axes = split_axes(placements)
    local, w = to_local(x), to_local(weight, axes)
    b = None if bias is None else to_local(bias, axes)
    kernel = tuple(weight.shape[2:])
    sizes_out = [
        (shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1 for i in range(n)
    ]
    out_shape = (shape[0], weight.shape[1] * groups, *sizes_out)
    local_pad, local_extra, crops = list(padding), list(extra), []
    exact = True  # on every rank: so that all have the same graph
    for i in range(n):
        dim = i + 2
        axis = axis_of(placements, dim)
        if axis is None:
            if shape[dim] == 1 and extra[i] >= dilation[i]:  # torch takes that with a stride alone: see `strides`
                local_pad[i] = local_extra[i] = 0
                crops.append((dim, Interval(0, sizes_out[i]), -padding[i]))
                exact = False
            continue
        ranks = sizes(mesh)[axis]
        s, p, r = stride[i], padding[i], dilation[i] * (kernel[i] - 1)

        def need(out: Interval, s: int = s, p: int = p, r: int = r, size: int = shape[dim]) -> Interval:
            if not out.size:
                return Interval(0, 0)
            return Interval(-(-(out.lo + p - r) // s), (out.hi - 1 + p) // s + 1).meet(Interval(0, size))

        wanted = tuple(need(out) for out in chunks(sizes_out[i], ranks))
        local = fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))
        out, got = owned(mesh, placements, dim, sizes_out[i]), wanted[Line(mesh, axis, dim, cause).me]
        exact = exact and all(
            not o.size or (have.size and have.lo * s - p == o.lo and (have.size - 1) * s + r + 1 == o.size)
            for o, have in zip(chunks(sizes_out[i], ranks), wanted, strict=True)
        )
        local_pad[i] = local_extra[i] = 0
        crops.append((dim, out, got.lo * s - p))
    local_out = local_shape(mesh, placements, out_shape)
    whole = not crops or all(local.shape[dim] and out.size for dim, out, _ in crops)
    if not whole or not local.numel():
        one = local.new_zeros((1, local.shape[1], *(1 for _ in range(n)))) + local.narrow(0, 0, 0).sum()
        made_up = native(one, w, b if exact else None, stride, 0, 0, groups, dilation)
        y = local.new_zeros(local_out) + made_up.flatten().narrow(0, 0, 0).sum()  # the graph that others have
    else:
        # one position needs no stride, with which torch's gradient of the input reads other memory (2.13.0, AVX512)
        strides = tuple(1 if size == 1 else s for size, s in zip(local.shape[2:], stride, strict=True))
        widen = widened(local) or unreliable(local, w.shape, Conv(strides, dilation, groups), local.shape[2:])
        wide: Any = [t.float() if t is not None and widen else t for t in (local, w, b if exact else None)]
        with torch.autocast(local.device.type, enabled=False):  # all is cast already
            y = native(*wide, strides, local_pad, local_extra, groups, dilation).to(local.dtype)
        y = y.contiguous(memory_format=memory_format(local))  # torch's reference kernel forgets channels_last
        for dim, out, start in crops if not exact else []:
            y = _crop(y, dim, start, out)
    if b is not None and not exact:
        y = y + b.view(1, -1, *(1 for _ in range(n)))
    return from_local(y, mesh, placements, out_shape, cause.ledger)


def _crop(y: torch.Tensor, dim: int, start: int, out: Interval) -> torch.Tensor:
    """Positions `out` of a result whose first position is `start`; positions beyond its end are zero."""
    lo = out.lo - start
    hi = min(y.shape[dim], out.hi - start)
    y = y.narrow(dim, max(0, lo), max(0, hi - max(0, lo)))
    missing = out.size - y.shape[dim]
    if missing:
        pad = [0, 0] * (y.ndim - 1 - dim) + [max(0, -lo), missing - max(0, -lo)]
        y = F.pad(y, pad)
    return y


@function(torch.convolution)
def convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """The form of torch that is both."""
    if transposed:
        return conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(input, weight, bias, stride, padding, dilation, groups)


@function(torch.conv_tbc)
def conv_tbc(input: Any, weight: Any, bias: Any, pad: int = 0) -> Any:
    """Convolution over the first dim: [T, B, C] with weights [K, C, F]."""
    return conv(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)
