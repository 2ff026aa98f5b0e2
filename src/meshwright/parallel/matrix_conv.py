"""Convolutions with large weights at few positions, as matrix products (im2col).

Deep layers of a volume that is small or split have few positions left and most of the weights. torch's kernels
reorder those weights on every call, which takes longer than the work at very few positions, and their gradient, which
costs more at four times as many; a matrix product takes them where they lie. What the positions read is laid out as
rows, at most as large as the weight. Pads may differ on the two sides, and no output is computed that is not
wanted. Results have their channels together in memory (channels_last).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from meshwright.parallel.signature import Conv, Like

Pads = Sequence[tuple[int, int]]

LARGE_WEIGHT = 3 << 18  # elements: in smaller ones the reordering costs less than the calls that are made here
LARGE_IMAGE_WEIGHT = 1 << 19  # the same for the gradient of a weight of images
# Positions ÷ output channels up to which it is a matrix product:
IMAGE_POSITIONS = 1.0  # the gradient of the weight for images
FEW_POSITIONS = 0.25  # that for volumes, and whatever torch is slow at
FEWEST_POSITIONS = 0.0625  # other outputs and gradients of inputs
Of = Literal["output", "input", "weight"]
OF: tuple[Of, ...] = ("output", "input", "weight")
Room = Callable[[], torch.Tensor]  # gives memory in the order of the weight for its gradient
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def is_matrix(x: Like, weight: Like, conv: Conv, out_sizes: Sequence[int], of: Of) -> bool:
    """Whether the output of a convolution to `out_sizes`, or the gradient of its input or weight, is better done as a
    matrix product."""
    large = LARGE_IMAGE_WEIGHT if of == "weight" and x.ndim == 4 else LARGE_WEIGHT
    if weight.numel() < large or conv.groups != 1 or x.device.type != "cpu" or x.dtype not in _DTYPES:
        return False
    return x.shape[0] * math.prod(out_sizes) <= _few(x, of) * weight.shape[0]


def _few(x: Like, of: Of) -> float:
    """Positions ÷ output channels up to which a matrix product is faster (docs/constants.md)."""
    if of == "weight":
        return IMAGE_POSITIONS if x.ndim == 4 else FEW_POSITIONS
    # Of lines (near a cut of images) torch knows no channels_last, so it copies them and the weight. For volumes in
    # fp32 it leaves oneDNN, which is slower still where channels lie together. Weights of images it reorders.
    together, full = not x.is_contiguous(), x.dtype == torch.float32
    slow = (full or of == "input") if x.ndim == 4 else (full and of == "output")
    return FEW_POSITIONS if x.ndim == 3 or (together and slow) else FEWEST_POSITIONS


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv: Conv, pads: Pads, out_sizes: Sequence[int]
) -> torch.Tensor:
    """`x` [N, C, *space] → [N, F, *out_sizes], the first `out_sizes` positions of the padded convolution."""
    y = F.linear(_rows(x, weight, conv, pads, out_sizes), _flat(weight), bias)
    return y.view(x.shape[0], *out_sizes, -1).movedim(-1, 1)


def input_gradient(
    grad: torch.Tensor, x_shape: Sequence[int], weight: torch.Tensor, conv: Conv, pads: Pads
) -> torch.Tensor:
    """The gradient of an input of `x_shape` for that of the outputs, `grad` [N, F, *out]."""
    channels, out_sizes = weight.shape[1], grad.shape[2:]
    shares = (_lines(grad) @ _flat(weight)).view(x_shape[0], *out_sizes, *_kept_order(weight))
    if not _is_last(weight):
        shares = shares.movedim(1 + len(out_sizes), -1)
    wide = torch.float32 if grad.dtype == torch.bfloat16 else grad.dtype  # many shares are added up
    out = grad.new_zeros((x_shape[0], *x_shape[2:], channels), dtype=wide)
    for taps in itertools.product(*(range(k) for k in weight.shape[2:])):
        share, into = shares[(slice(None),) * (1 + len(out_sizes)) + taps], out
        for dim, (tap, (before, _)) in enumerate(zip(taps, pads, strict=True), start=1):
            stride, at = conv.stride[dim - 1], tap * conv.dilation[dim - 1] - before
            first = max(0, -(at // stride))  # the first output that reads a position of `x`, not of the padding
            count = min(share.shape[dim], (x_shape[dim + 1] - 1 - at) // stride + 1) - first
            if count <= 0:
                break
            share = share.narrow(dim, first, count)
            lo = at + first * stride
            into = into[(slice(None),) * dim + (slice(lo, lo + (count - 1) * stride + 1, stride),)]
        else:
            into += share
    return out.movedim(-1, 1).to(grad.dtype)


def weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    pads: Pads,
    room: Room | None = None,
) -> torch.Tensor:
    """The gradient of `weight` (which gives its shape and memory order) for that of the outputs; where `room` says, if
    filters lie one behind the other."""
    lines, rows = _lines(grad).t(), _rows(x, weight, conv, pads, grad.shape[2:])
    if room is not None and _ordered(weight).is_contiguous():
        into = room()
        torch.mm(lines, rows, out=_flat(into))
        return into
    found = (lines @ rows).view(weight.shape[0], *_kept_order(weight))
    return found.movedim(-1, 1) if _is_last(weight) else found


def _is_last(weight: torch.Tensor) -> bool:
    """Whether the taps come before the channels in memory."""
    return not weight.is_contiguous()


def _kept_order(weight: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a filter in the order in which rows hold it: that of the weight, so that it is not copied."""
    kernel, channels = tuple(weight.shape[2:]), weight.shape[1]
    return (*kernel, channels) if _is_last(weight) else (channels, *kernel)


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """[F, C, *kernel] → [F, what a position reads]."""
    return _ordered(weight).reshape(weight.shape[0], -1)


def _ordered(weight: torch.Tensor) -> torch.Tensor:
    """With the dims of a filter in the order in which rows hold it."""
    return weight.movedim(1, -1) if _is_last(weight) else weight


def _lines(grad: torch.Tensor) -> torch.Tensor:
    """[N, F, *out] → [positions, F]."""
    return grad.movedim(1, -1).reshape(-1, grad.shape[1])


def _rows(x: torch.Tensor, weight: torch.Tensor, conv: Conv, pads: Pads, out_sizes: Sequence[int]) -> torch.Tensor:
    """What each output position reads: [positions, channels and taps in the order of the weight]."""
    ends = [value for pair in reversed(pads) for value in pair]
    windows = (F.pad(x, ends) if any(ends) else x).movedim(1, -1)
    for dim, (k, s, d, size) in enumerate(_per_dim(weight, conv, out_sizes), start=1):
        windows = windows.unfold(dim, d * (k - 1) + 1, s).narrow(dim, 0, size)[..., ::d]
    if _is_last(weight):
        windows = windows.movedim(1 + len(out_sizes), -1)
    return windows.reshape(x.shape[0] * math.prod(out_sizes), -1)


def _per_dim(weight: torch.Tensor, conv: Conv, out_sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    return zip(weight.shape[2:], conv.stride, conv.dilation, out_sizes, strict=True)
