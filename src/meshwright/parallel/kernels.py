"""Local convolutions: the one place where kernels and memory formats are chosen.

Pads are given per spatial dim as (before, after), may differ, and may be negative (then the input is cut).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from meshwright.parallel import matrix_conv
from meshwright.parallel.guards import Pad, spatial_pad, tamed, unreliable
from meshwright.parallel.signature import Conv, Like, Pads, Signature, signature

CLIFF = 20480  # torch leaves oneDNN for fp32 on CPU where N == 1 and N * C * (first two spatial dims) is at most this


_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _slabs(x: Like, out_depth: int) -> int:
    """Into how many slabs along the first spatial dim a convolution is cut to stay on the fast kernel; 1: as it is.

    For fp32 on the CPU torch leaves oneDNN for a reference kernel where N == 1 and N * C * D * H <= CLIFF (the
    condition `use_mkldnn` of its convolution; measured in docs/constants.md). Slabs become a batch: N > 1.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim != 5 or x.shape[0] != 1:
        return 1
    if x.shape[1] * x.shape[2] * x.shape[3] > CLIFF:
        return 1
    return next((n for n in range(2, out_depth + 1) if out_depth % n == 0), 1)


def _cut(x: torch.Tensor, slabs: int, outputs: int, reach: int, stride: int, alike: int) -> torch.Tensor:
    """Overlapping slabs of a small input as a batch: [1, C, D, H, W] → [slabs, C, what `outputs` planes read, H, W]."""
    padded = F.pad(x, [0, 0, 0, 0, alike, alike]) if alike else x
    windows = padded.unfold(2, (outputs - 1) * stride + reach, outputs * stride)[:, :, :slabs]
    batch = windows[0].permute(1, 0, 4, 2, 3)
    return batch.contiguous(memory_format=memory_format(x))


def memory_format(x: Like) -> torch.memory_format:
    """channels_last of 2-D or 3-D data where `x` is so, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


def _joined(y: torch.Tensor) -> torch.Tensor:
    """[n, C, D, H, W] → [1, C, n D, H, W]; no copy in channels_last_3d."""
    n, c, d, h, w = y.shape
    if memory_format(y) is torch.channels_last_3d:
        return y.permute(0, 2, 3, 4, 1).reshape(1, n * d, h, w, c).permute(0, 4, 1, 2, 3)
    return y.transpose(0, 1).reshape(1, c, n * d, h, w)


def _parted(y: torch.Tensor, n: int) -> torch.Tensor:
    """[1, C, n D, H, W] → [n, C, D, H, W]; no copy in channels_last_3d."""
    _, c, d, h, w = y.shape
    if memory_format(y) is torch.channels_last_3d:
        return y.permute(0, 2, 3, 4, 1).reshape(n, d // n, h, w, c).permute(0, 4, 1, 2, 3)
    return y.reshape(c, n, d // n, h, w).transpose(0, 1)


def _is_pointwise(weight: Like, conv: Conv, alike: Sequence[int]) -> bool:
    """A kernel of one voxel: a matrix product, which torch on one thread hands to the reference kernel."""
    return math.prod(weight.shape[2:]) == 1 == max(conv.stride) == conv.groups and not any(alike)


@lru_cache(maxsize=1)
def _slow_halves() -> bool:
    """Whether this processor has no kernel for bf16 convolutions (no AVX512): torch then takes a loop of its own."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widened(x: Like) -> bool:
    """Whether a convolution of `x` is computed in fp32 and rounded: up to 100 times faster where halves are slow."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and _slow_halves()


def as_matrix(x: Like, weight: Like, conv: Conv, out_sizes: Sequence[int], of: matrix_conv.Of) -> bool:
    """Whether the output of a convolution to `out_sizes`, or a gradient, is computed as a matrix product."""
    return matrix_conv.is_matrix(x, weight, conv, out_sizes, of) and not widened(x)


def _ordered(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`y` in the memory order that torch gives: channels_last where the input or the weight is that alone."""
    formats = [memory_format(t) for t in (x, weight) if not t.is_contiguous()]
    return y.contiguous(
        memory_format=next((f for f in formats if f is not torch.contiguous_format), None) or torch.contiguous_format
    )


class _Planned(NamedTuple):
    """All that is decided about a local convolution."""

    forward: bool  # torch's own operator does all that is wanted, with `constants`
    backward: bool
    constants: tuple[Any, ...]
    conv: Conv  # without strides that do not matter
    pads: Pads
    around: tuple[Pad, ...]
    matrices: tuple[bool, bool, bool]  # output, gradient of the input, of the weight


@lru_cache(maxsize=4096)
def _planned(x: Signature, weight: Signature, conv: Conv, pads: Pads, out_sizes: tuple[int, ...]) -> _Planned:
    tame, tame_pads = tamed(x.shape, weight.shape, conv, pads, out_sizes)
    kernel = weight.shape[2:]
    per_dim = zip(tame_pads, tame.stride, x.shape[2:], kernel, tame.dilation, strict=True)
    around = tuple(Pad.of(*ends, stride, size, d * (k - 1) + 1) for ends, stride, size, k, d in per_dim)
    alike = [pad.alike for pad in around]
    simple = (tame, tame_pads) == (conv, pads) and not any(pad.before or pad.after for pad in around)
    simple = simple and not (widened(x) or unreliable(x, weight.shape, conv, out_sizes))
    simple = simple and not (_matrix(x) and _is_pointwise(weight, conv, alike))
    simple = simple and not (x.ndim == 5 and _slabs(x, out_sizes[0]) > 1)
    simple = simple and _outputs(x, weight, conv, alike) == list(out_sizes)
    of_y, of_x, of_weight = (as_matrix(x, weight, conv, out_sizes, of) for of in matrix_conv.OF)
    constants = conv.stride, alike, conv.dilation, False, [0] * len(alike), conv.groups
    backward = simple and not (of_x or of_weight)
    return _Planned(simple and not of_y, backward, constants, tame, tame_pads, around, (of_y, of_x, of_weight))


def _outputs(x: Like, weight: Like, conv: Conv, alike: Sequence[int]) -> list[int]:
    """How many outputs torch's operator gives."""
    per_dim = zip(x.shape[2:], weight.shape[2:], alike, conv.stride, conv.dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // stride + 1 for size, k, p, stride, d in per_dim]


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv: Conv,
    pads: Sequence[tuple[int, int]],
    out_sizes: Sequence[int],
) -> torch.Tensor:
    """`x` [N, C, *spatial] → [N, F, *out_sizes]: the first `out_sizes` positions of the padded convolution."""
    plan = _planned(signature(x), signature(weight), conv, tuple(pads), tuple(out_sizes))
    if plan.forward:
        return _convolution(x, weight, bias, *plan.constants)
    conv, pads = plan.conv, plan.pads
    if plan.matrices[0]:
        with torch.autocast(x.device.type, enabled=False):  # the rules have cast already; backward keeps its dtype
            return _ordered(matrix_conv.forward(x, weight, bias, conv, pads, out_sizes), x, weight)
    out = _kernel(spatial_pad(x, plan.around), weight, bias, conv, [pad.alike for pad in plan.around])
    for dim, (pad, size) in enumerate(zip(plan.around, out_sizes, strict=True), start=2):
        if out.shape[dim] != size:
            out = out.narrow(dim, pad.lead, size)
    return out


def _kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, alike: Sequence[int]
) -> torch.Tensor:
    outputs = _outputs(x, weight, conv, alike)
    if widened(x) or unreliable(x, weight.shape, conv, outputs):
        wide = None if bias is None else bias.float()
        return _kernel(x.float(), weight.float(), wide, conv, alike).to(x.dtype)
    zeros = [0] * len(alike)
    if _matrix(x) and _is_pointwise(weight, conv, alike):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    args = (conv.stride, alike, conv.dilation, False, zeros, conv.groups)
    reach = conv.dilation[0] * (weight.shape[2] - 1) + 1
    slabs = _slabs(x, outputs[0])
    if slabs == 1:
        return _convolution(x, weight, bias, *args)
    batch = _cut(x, slabs, outputs[0] // slabs, reach, conv.stride[0], alike[0])
    args = (conv.stride, [0, *alike[1:]], conv.dilation, False, zeros, conv.groups)
    return _joined(_convolution(batch, weight, bias, *args))


def _matrix(x: Like) -> bool:
    """Whether the channels of `x` lie together, so that its voxels are the rows of a matrix; not in bf16, for which
    torch's convolution is up to twice as fast as its product."""
    if x.device.type != "cpu" or x.ndim != 5 or x.dtype == torch.bfloat16:
        return False
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    pads: Sequence[tuple[int, int]],
    mask: tuple[bool, bool, bool],
    room: matrix_conv.Room | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `conv_forward` for input, weight and bias, as far as `mask` asks for them; that of the weight
    where `room` says, if it costs nothing."""
    plan = _planned(signature(x), signature(weight), conv, tuple(pads), tuple(grad.shape[2:]))
    if plan.backward and any(mask[:2]):
        d_x, d_weight, d_bias = _convolution_backward(
            grad, x, weight, [weight.shape[0]] if mask[2] else None, *plan.constants, mask
        )
        return d_x, d_weight, d_bias
    conv, pads = plan.conv, plan.pads
    own_x, own_weight = mask[0] and plan.matrices[1], mask[1] and plan.matrices[2]
    if own_x or own_weight:
        rest = (mask[0] and not own_x, mask[1] and not own_weight, mask[2])
        found = conv_backward(grad, x, weight, conv, pads, rest) if any(rest) else (None, None, None)
        with torch.autocast(x.device.type, enabled=False):
            d_x = matrix_conv.input_gradient(grad, x.shape, weight, conv, pads) if own_x else found[0]
            d_weight = matrix_conv.weight_gradient(grad, x, weight, conv, pads, room) if own_weight else found[1]
        return _ordered(d_x, x, weight) if own_x and d_x is not None else d_x, d_weight, found[2]
    if not any(mask[:2]):
        return None, None, grad.sum((0, *range(2, grad.ndim))) if mask[2] else None
    padded, alike = spatial_pad(x, plan.around), [pad.alike for pad in plan.around]
    full = zip(plan.around, _outputs(padded, weight, conv, alike), grad.shape[2:], strict=True)
    surplus = [(pad.lead, outputs - pad.lead - wanted) for pad, outputs, wanted in full]
    if any(any(pair) for pair in surplus):
        grad = F.pad(grad, [value for pair in reversed(surplus) for value in pair])
    d_x, d_weight, d_bias = _kernel_backward(grad, padded, weight, conv, alike, mask)
    if d_x is not None:
        for dim, pad in enumerate(plan.around, start=2):
            if pad.before > 0 or pad.after > 0:
                d_x = d_x.narrow(dim, max(0, pad.before), d_x.shape[dim] - max(0, pad.before) - max(0, pad.after))
        cuts = [-min(0, value) for pad in reversed(plan.around) for value in (pad.before, pad.after)]
        if any(cuts):
            d_x = F.pad(d_x, cuts)
    return d_x, d_weight, d_bias


def _kernel_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    alike: Sequence[int],
    mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if widened(x) or unreliable(x, weight.shape, conv, grad.shape[2:]):
        out = _kernel_backward(grad.float(), x.float(), weight.float(), conv, alike, mask)
        d_x, d_weight, d_bias = (None if t is None else t.to(x.dtype) for t in out)
        return d_x, d_weight, d_bias
    if _matrix(x) and _is_pointwise(weight, conv, alike):
        rows, flat = grad.movedim(1, -1).flatten(0, -2), weight.flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            d_x = (rows @ flat).view(*grad.movedim(1, -1).shape[:-1], -1).movedim(-1, 1) if mask[0] else None
            d_weight = (rows.t() @ x.movedim(1, -1).flatten(0, -2)).view(weight.shape) if mask[1] else None
        return d_x, d_weight, rows.sum(0) if mask[2] else None
    backward, zeros = _convolution_backward, [0] * len(alike)
    bias_sizes = [weight.shape[0]] if mask[2] else None
    slabs = _slabs(x, grad.shape[2])
    if slabs == 1:
        args = (conv.stride, alike, conv.dilation, False, zeros, conv.groups, mask)
        d_x, d_weight, d_bias = backward(grad, x, weight, bias_sizes, *args)
        return d_x, d_weight, d_bias
    reach, step = conv.dilation[0] * (weight.shape[2] - 1) + 1, conv.stride[0]
    outputs = grad.shape[2] // slabs
    batch = _cut(x, slabs, outputs, reach, step, alike[0])
    args = (conv.stride, [0, *alike[1:]], conv.dilation, False, zeros, conv.groups, mask)
    d_batch, d_weight, d_bias = backward(_parted(grad, slabs), batch, weight, bias_sizes, *args)
    if not mask[0]:
        return None, d_weight, d_bias
    width = batch.shape[2]
    del batch  # as large as the input, and no longer needed
    d_x = torch.empty_like(x, memory_format=memory_format(x)).zero_()
    for index in range(slabs):  # neighbouring slabs overlap; the first and the last reach into the padding
        lo = index * outputs * step - alike[0]
        first, last = max(0, lo), min(x.shape[2], lo + width)
        if last > first:
            d_x.narrow(2, first, last - first).add_(d_batch[index].narrow(1, first - lo, last - first))
    return d_x, d_weight, d_bias
