"""Local convolutions: the one place where kernels and memory formats are chosen.

Pads are given per spatial dim as (before, after), may differ, and may be negative (then the input is cut). Torch's
convolution pads alike on both sides: `_Pad` finds the alike pad whose surplus outputs are dropped, and copies the
input only where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

CLIFF = 20480  # torch leaves oneDNN for fp32 on CPU where N == 1 and N * C * (first two spatial dims) is at most this


@dataclass(frozen=True)
class Conv:
    """A convolution's constants, one entry per spatial dim."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Pad(NamedTuple):
    alike: int  # padding handed to the kernel
    before: int  # explicit zeros in front (negative: cut)
    after: int
    lead: int  # surplus outputs at the front

    @classmethod
    def of(cls, before: int, after: int, stride: int) -> _Pad:
        cut_before, cut_after = min(0, before), min(0, after)
        before, after = max(0, before), max(0, after)
        if before >= after:
            return cls(before, cut_before, cut_after, 0)
        if (after - before) % stride == 0:
            return cls(after, cut_before, cut_after, (after - before) // stride)
        return cls(before, cut_before, cut_after + after - before, 0)


def _spatial_pad(x: torch.Tensor, pads: Sequence[_Pad]) -> torch.Tensor:
    """Explicit pads and cuts (cuts are views)."""
    for dim, pad in enumerate(pads, start=2):
        lo, hi = min(0, pad.before), min(0, pad.after)
        if lo or hi:
            x = x.narrow(dim, -lo, x.shape[dim] + lo + hi)
    flat = [max(0, value) for pad in reversed(pads) for value in (pad.before, pad.after)]
    return F.pad(x, flat) if any(flat) else x


def _order(x: torch.Tensor) -> tuple[int, ...] | None:
    """A permutation of the spatial dims that keeps fp32 CPU convolutions on the fast kernel, or None for as it is.

    Source: the condition `use_mkldnn` of torch's convolution, measured in `docs/constants.md`.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim != 5 or x.shape[0] != 1:
        return None
    sizes = x.shape[2:]
    if x.shape[1] * sizes[0] * sizes[1] > CLIFF:
        return None
    order = tuple(sorted(range(3), key=lambda dim: -sizes[dim]))
    if x.shape[1] * sizes[order[0]] * sizes[order[1]] <= CLIFF or order == (0, 1, 2):
        return None
    return order


@lru_cache(maxsize=1)
def _slow_halves() -> bool:
    """Whether this processor has no kernel for bf16 convolutions (no AVX512): torch then takes a loop of its own."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widened(x: torch.Tensor) -> bool:
    """Whether a convolution of `x` is computed in fp32 and rounded: up to 100 times faster where halves are slow."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and _slow_halves()


def _permuted(tensors: Sequence[torch.Tensor], order: Sequence[int]) -> list[torch.Tensor]:
    return [t.permute(0, 1, *(2 + dim for dim in order)) for t in tensors]


def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv: Conv,
    pads: Sequence[tuple[int, int]],
    out_sizes: Sequence[int],
) -> torch.Tensor:
    """`x` [N, C, *spatial] → [N, F, *out_sizes]: the first `out_sizes` positions of the padded convolution."""
    plan = [_Pad.of(before, after, stride) for (before, after), stride in zip(pads, conv.stride, strict=True)]
    x = _spatial_pad(x, plan)
    alike = [pad.alike for pad in plan]
    out = _kernel(x, weight, bias, conv, alike)
    for dim, (pad, size) in enumerate(zip(plan, out_sizes, strict=True), start=2):
        if out.shape[dim] != size:
            out = out.narrow(dim, pad.lead, size)
    return out


def _kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, alike: Sequence[int]
) -> torch.Tensor:
    if widened(x):
        wide = None if bias is None else bias.float()
        return _kernel(x.float(), weight.float(), wide, conv, alike).to(x.dtype)
    zeros = [0] * len(alike)
    order = _order(x)
    if order is None:
        return torch.ops.aten.convolution(x, weight, bias, conv.stride, alike, conv.dilation, False, zeros, conv.groups)
    x, weight = _permuted([x, weight], order)
    stride, pad, dilation = ([values[dim] for dim in order] for values in (conv.stride, alike, conv.dilation))
    out = torch.ops.aten.convolution(x, weight, bias, stride, pad, dilation, False, zeros, conv.groups)
    return _permuted([out], [order.index(dim) for dim in range(3)])[0]


def conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    pads: Sequence[tuple[int, int]],
    mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `conv_forward` for input, weight and bias, as far as `mask` asks for them."""
    plan = [_Pad.of(before, after, stride) for (before, after), stride in zip(pads, conv.stride, strict=True)]
    padded = _spatial_pad(x, plan)
    surplus = []
    for dim, pad in enumerate(plan, start=2):
        reach = conv.dilation[dim - 2] * (weight.shape[dim] - 1) + 1
        full = (padded.shape[dim] + 2 * pad.alike - reach) // conv.stride[dim - 2] + 1
        surplus.append((pad.lead, full - pad.lead - grad.shape[dim]))
    if any(any(pair) for pair in surplus):
        grad = F.pad(grad, [value for pair in reversed(surplus) for value in pair])
    alike = [pad.alike for pad in plan]
    d_x, d_weight, d_bias = _kernel_backward(grad, padded, weight, conv, alike, mask)
    if d_x is not None:
        for dim, pad in enumerate(plan, start=2):
            if pad.before > 0 or pad.after > 0:
                d_x = d_x.narrow(dim, max(0, pad.before), d_x.shape[dim] - max(0, pad.before) - max(0, pad.after))
        cuts = [-min(0, value) for pad in reversed(plan) for value in (pad.before, pad.after)]
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
    if widened(x):
        out = _kernel_backward(grad.float(), x.float(), weight.float(), conv, alike, mask)
        d_x, d_weight, d_bias = (None if t is None else t.to(x.dtype) for t in out)
        return d_x, d_weight, d_bias
    zeros = [0] * len(alike)
    bias_sizes = [weight.shape[0]] if mask[2] else None
    order = _order(x)
    backward = torch.ops.aten.convolution_backward
    if order is None:
        out = backward(grad, x, weight, bias_sizes, conv.stride, alike, conv.dilation, False, zeros, conv.groups, mask)
        return tuple(out)
    grad, x, weight = _permuted([grad, x, weight], order)
    stride, pad, dilation = ([values[dim] for dim in order] for values in (conv.stride, alike, conv.dilation))
    d_x, d_weight, d_bias = backward(
        grad, x, weight, bias_sizes, stride, pad, dilation, False, zeros, conv.groups, mask
    )
    back = [order.index(dim) for dim in range(3)]
    d_x = _permuted([d_x], back)[0] if mask[0] else None
    d_weight = _permuted([d_weight], back)[0] if mask[1] else None
    return d_x, d_weight, d_bias
