"""Convolution and transposed convolution: every kernel, stride, dilation, padding, uneven and empty shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, conv, padded, per_dim, transposed
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}


def convolution(
    name: str,
    ndim: int,
    k: Any,
    *,
    shape: tuple[int, ...] = (),
    out: int = 6,
    sample: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    size = shape or SIZES[ndim]
    s, d, p = options.get("stride", 1), options.get("dilation", 1), options.get("padding", 0)
    mode = options.get("padding_mode", "zeros")
    if mode == "zeros":
        stages = (conv(ndim, k, s, p, d),)
    else:  # the padded tensor has chunks of its own: one exchange to pad, one for the kernel
        torch_mode = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}[mode]
        pads = tuple(padded(2 + i, w, w, torch_mode) for i, w in enumerate(per_dim(p, ndim)))
        stages = (*pads, conv(ndim, k, s, 0, d))
    return Case(
        f"conv{ndim}d_{name}",
        lambda: CONV[ndim](size[1], out, k, **options),
        (Input(size),),
        Bound(stages),
        sample=sample,
        dtype=dtype,
    )


def transpose(name: str, ndim: int, k: Any, *, shape: tuple[int, ...] = (), sample: bool = False, **o: Any) -> Case:
    size = shape or SIZES[ndim]
    stage = transposed(
        ndim, k, o.get("stride", 1), o.get("padding", 0), o.get("output_padding", 0), o.get("dilation", 1)
    )
    make = lambda: TRANSPOSED[ndim](size[1], 6, k, **o)  # noqa: E731
    return Case(f"conv_transpose{ndim}d_{name}", make, (Input(size),), Bound((stage,)), sample=sample)


def padded_by_hand(name: str, ndim: int, pads: tuple[int, ...], k: int, s: int) -> Case:
    """Asymmetric padding, as the users of `F.pad` write it."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = CONV[ndim](4, 5, k, stride=s)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(F.pad(x, pads))

    stages = tuple(padded(1 + ndim - i, pads[2 * i], pads[2 * i + 1]) for i in reversed(range(len(pads) // 2)))
    return Case(f"conv{ndim}d_{name}", Padded, (Input(SIZES[ndim]),), Bound((*stages, conv(ndim, k, s))))


class Twice(nn.Module):
    """One weight used twice: its gradient is the sum of both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.conv(x)))


class Functional(nn.Module):
    """The functional form, with the weight scaled on the way: the parameter is used through another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3) * 0.2)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * self.gain, None, 2, 1)


CASES = [
    convolution("k1", 1, 1),
    convolution("k3_p1", 1, 3, padding=1, sample=True),
    convolution("k4", 1, 4, padding=2),
    convolution("k7_d3", 1, 7, padding=9, dilation=3, sample=True),
    convolution("k5_s3", 1, 5, stride=3, padding=2),
    convolution("k2_s3_gap", 1, 2, stride=3),
    convolution("k3_circular", 1, 3, padding=1, padding_mode="circular"),
    convolution("k3_short", 1, 3, padding=1, shape=(2, 4, 3)),
    convolution("k3_p5_wide", 1, 3, padding=5, shape=(2, 4, 9)),
    convolution("k1", 2, 1),
    convolution("k1_s2", 2, 1, stride=2),
    convolution("k2", 2, 2),
    convolution("k3_p1", 2, 3, padding=1, sample=True),
    convolution("k3_s2_p1", 2, 3, stride=2, padding=1, sample=True),
    convolution("k4_s2_p1", 2, 4, stride=2, padding=1),
    convolution("k5_valid", 2, 5),
    convolution("k7_p3", 2, 7, padding=3),
    convolution("k3_d2", 2, 3, padding=2, dilation=2),
    convolution("k3_d3_s2", 2, 3, padding=3, dilation=3, stride=2),
    convolution("k4_same", 2, 4, padding="same"),
    convolution("k3x5_mixed", 2, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    convolution("k3_reflect", 2, 3, padding=1, padding_mode="reflect"),
    convolution("k5_reflect_s2", 2, 5, padding=2, padding_mode="reflect", stride=2),
    convolution("k3_replicate", 2, 3, padding=2, padding_mode="replicate"),
    convolution("k3_circular", 2, 3, padding=(1, 2), padding_mode="circular"),
    convolution("groups", 2, 3, padding=1, groups=2),
    convolution("depthwise", 2, 3, padding=1, groups=4, out=8, bias=False),
    convolution("k3_fp32", 2, 3, padding=1, dtype=torch.float32),
    convolution("k1", 3, 1),
    convolution("k2_s2", 3, 2, stride=2),
    convolution("k2_p1", 3, 2, padding=1),
    convolution("k3_p1", 3, 3, padding=1, sample=True),
    convolution("k3_p1_even", 3, 3, padding=1, shape=(2, 4, 8, 8, 8)),
    convolution("k3_p1_nobias", 3, 3, padding=1, bias=False),
    convolution("k3_valid", 3, 3, padding="valid"),
    convolution("k3_same_d2", 3, 3, padding="same", dilation=2),
    convolution("k4_same", 3, 4, padding="same", sample=True),
    convolution("k4_s2_p1", 3, 4, stride=2, padding=1),
    convolution("k5_p2", 3, 5, padding=2),
    convolution("k7_p3_halo_wider_than_shard", 3, 7, padding=3, shape=(2, 2, 7, 6, 5), sample=True),
    convolution("k3_d3_halo_wider_than_shard", 3, 3, padding=3, dilation=3, sample=True),
    convolution("k3_s2_p1", 3, 3, stride=2, padding=1, sample=True),
    convolution("k3_s3", 3, 3, stride=3, padding=1),
    convolution("k2_s3_gap", 3, 2, stride=3),
    convolution("k1_s2_gap", 3, 1, stride=2),
    convolution("k135_mixed", 3, (1, 3, 5), stride=(1, 2, 1), padding=(0, 1, 2)),
    convolution("k3_size5_empty_shards", 3, 3, padding=1, shape=(2, 4, 5, 5, 5), sample=True),
    convolution("k3_reflect", 3, 3, padding=1, padding_mode="reflect"),
    convolution("k3_replicate", 3, 3, padding=1, padding_mode="replicate"),
    convolution("k3_circular", 3, 3, padding=1, padding_mode="circular"),
    convolution("groups", 3, 3, padding=1, groups=2),
    convolution("depthwise", 3, 3, padding=1, groups=4, out=4),
    convolution("k3_fp32", 3, 3, padding=1, dtype=torch.float32, sample=True),
    padded_by_hand("pad_asymmetric", 3, (2, 0, 0, 1, 1, 2), 3, 1),
    padded_by_hand("pad_asymmetric_s2", 2, (1, 0, 0, 1), 3, 2),
    transpose("k2_s2", 1, 2, stride=2, sample=True),
    transpose("k5_s3_op1", 1, 5, stride=3, padding=1, output_padding=1),
    transpose("k2_s2", 2, 2, stride=2),
    transpose("k3_s2_p1_op1", 2, 3, stride=2, padding=1, output_padding=1, sample=True),
    transpose("k4_s2_p1", 2, 4, stride=2, padding=1),
    transpose("k3_d2", 2, 3, padding=2, dilation=2),
    transpose("groups", 2, 3, stride=2, padding=1, groups=2, bias=False),
    transpose("k2_s2", 3, 2, stride=2, sample=True),
    transpose("k3_s2_p1_op1", 3, 3, stride=2, padding=1, output_padding=1),
    transpose("k4_s2_p1", 3, 4, stride=2, padding=1, sample=True),
    transpose("k3_s1", 3, 3),
    transpose("k1_s2_gap", 3, 1, stride=2, output_padding=1),
    transpose("k3_s2_d2", 3, 3, stride=2, dilation=2, padding=2),
    transpose("groups_mixed", 3, (2, 3, 4), stride=(2, 1, 2), padding=(0, 1, 1), groups=2),
    Case("conv3d_parameter_used_twice", Twice, (Input(SIZES[3]),), Bound((conv(3, 3, 1, 1), conv(3, 3, 1, 1)))),
    Case(  # the gradient of the scaled weight is no parameter's: its sum counts with the exchanges
        "conv2d_functional_scaled_weight",
        Functional,
        (Input(SIZES[2]),),
        Bound((conv(2, 3, 2, 1),), statistics=lambda shapes: 2 * 6 * 4 * 9),
    ),
    Case(
        "conv3d_plain_weight",
        lambda: Call(lambda x, w: F.conv3d(x, w, padding=1)),
        (Input(SIZES[3]), Input((2, 4, 3, 3, 3), plain=True)),
        Bound((conv(3, 3, 1, 1),)),
    ),
]
