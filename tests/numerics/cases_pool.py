"""Pooling and interpolation."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, adaptive, aligned, conv, interpolate
from torch import nn

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
LP = {1: nn.LPPool1d, 2: nn.LPPool2d, 3: nn.LPPool3d}
ADAPTIVE = {
    ("avg", 1): nn.AdaptiveAvgPool1d,
    ("avg", 2): nn.AdaptiveAvgPool2d,
    ("avg", 3): nn.AdaptiveAvgPool3d,
    ("max", 1): nn.AdaptiveMaxPool1d,
    ("max", 2): nn.AdaptiveMaxPool2d,
    ("max", 3): nn.AdaptiveMaxPool3d,
}
CHANNELS = Bound(statistics=lambda shapes: 2 * shapes[0][0] * shapes[0][1])  # one number per sample and channel


def pool(
    kind: str, name: str, ndim: int, k: Any, *, shape: tuple[int, ...] = (), sample: bool = False, **o: Any
) -> Case:
    table = MAX if kind == "max" else AVERAGE
    stage = conv(ndim, k, o.get("stride") or k, o.get("padding", 0), o.get("dilation", 1), o.get("ceil_mode", False))
    inputs = (Input(shape or SIZES[ndim]),)
    return Case(f"{kind}_pool{ndim}d_{name}", lambda: table[ndim](k, **o), inputs, Bound((stage,)), sample=sample)


def lp(name: str, ndim: int, p: float, ceil: bool) -> Case:
    """Power-average pooling of positive values."""
    make = lambda: LP[ndim](p, 3, 2, ceil_mode=ceil)  # noqa: E731
    return Case(
        f"lp_pool{ndim}d_{name}", make, (Input(SIZES[ndim], offset=6.0),), Bound((conv(ndim, 3, 2, ceil=ceil),))
    )


def adapt(kind: str, ndim: int, out: tuple[int, ...], shape: tuple[int, ...] = (), sample: bool = False) -> Case:
    whole = all(size == 1 for size in out)
    name = "x".join(map(str, out))
    bound = CHANNELS if whole else Bound((adaptive(*out),))
    inputs = (Input(shape or SIZES[ndim]),)
    make = lambda: ADAPTIVE[kind, ndim](out)  # noqa: E731
    return Case(f"adaptive_{kind}_pool{ndim}d_{name}", make, inputs, bound, sample=sample)


def resize(name: str, ndim: int, mode: str, out: tuple[int, ...], *, sample: bool = False, **options: Any) -> Case:
    call = Call(lambda x: F.interpolate(x, mode=mode, **options))
    stage = aligned(*out) if options.get("align_corners") else interpolate(mode != "nearest", *out)
    return Case(f"interpolate{ndim}d_{name}", lambda: call, (Input(SIZES[ndim]),), Bound((stage,)), sample=sample)


def scaled(ndim: int, factor: float) -> tuple[int, ...]:
    return tuple(int(size * factor) for size in SIZES[ndim][2:])


CASES = [
    pool("max", "k2", 1, 2),
    pool("max", "k3_s2_p1", 1, 3, stride=2, padding=1, sample=True),
    pool("max", "k2", 2, 2),
    pool("max", "k3_s2_p1", 2, 3, stride=2, padding=1),
    pool("max", "k3_d2_ceil", 2, 3, stride=2, padding=1, dilation=2, ceil_mode=True),
    pool("max", "k2x3", 2, (2, 3), stride=(3, 1)),
    pool("max", "k2", 3, 2, sample=True),
    pool("max", "k2_even", 3, 2, shape=(2, 4, 8, 16, 8)),
    pool("max", "k3_s2_p1", 3, 3, stride=2, padding=1, sample=True),
    pool("max", "k3_s1_p1", 3, 3, stride=1, padding=1),
    pool("max", "k2_ceil", 3, 2, ceil_mode=True),
    pool("max", "k3_s2_p1_even", 2, 3, stride=2, padding=1, shape=(2, 4, 32, 13)),  # strips near the cuts
    pool("max", "k5_s1_p2_even", 3, 5, stride=1, padding=2, shape=(2, 3, 24, 5, 6)),
    pool("avg", "k2_s1_p1", 2, 2, stride=1, padding=1),  # a whole dim that grows
    pool("avg", "k2_s1_p1", 3, 2, stride=1, padding=1),
    pool("avg", "k3_s2_p1", 1, 3, stride=2, padding=1),
    pool("avg", "k2", 2, 2),
    pool("avg", "k3_s2_p1", 2, 3, stride=2, padding=1, sample=True),
    pool("avg", "k3_p1_excluded", 2, 3, stride=2, padding=1, count_include_pad=False),
    pool("avg", "k3_ceil", 2, 3, stride=2, padding=1, ceil_mode=True),
    pool("avg", "k3_ceil_excluded", 2, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    pool("avg", "k2_divisor", 2, 2, divisor_override=3),
    pool("avg", "k2", 3, 2),
    pool("avg", "k3_s2_p1", 3, 3, stride=2, padding=1, sample=True),
    pool("avg", "k3_s1_p1_excluded", 3, 3, stride=1, padding=1, count_include_pad=False),
    pool("avg", "k4_s3_ceil_divisor", 3, 4, stride=3, ceil_mode=True, divisor_override=5),
    pool("max", "k1_s5_gap", 1, 1, stride=5),
    pool("max", "k4x2_s1x5_p2x1_d1x3", 2, (4, 2), stride=(1, 5), padding=(2, 1), dilation=(1, 3)),
    pool("max", "k2_s3_ceil_small", 3, 2, stride=3, padding=1, ceil_mode=True, shape=(2, 3, 3, 5, 2)),
    pool("avg", "k4_s3_p2_ceil", 1, 4, stride=3, padding=2, ceil_mode=True, count_include_pad=False),
    pool("avg", "k4x1_s1x4", 2, (4, 1), stride=(1, 4), padding=(2, 0), divisor_override=7),
    pool("avg", "k2_s4_ceil_small", 3, 2, stride=4, padding=1, ceil_mode=True, shape=(2, 3, 3, 5, 2)),
    *(lp(f"p{p:g}_k3_s2{'_ceil' * ceil}", n, p, ceil) for n in (1, 2, 3) for p, ceil in ((2, False), (3, True))),
    lp("pinf", 2, math.inf, False),
    adapt("avg", 1, (1,)),
    adapt("avg", 1, (5,)),
    adapt("avg", 2, (1, 1), sample=True),
    adapt("avg", 2, (4, 5)),
    adapt("avg", 3, (1, 1, 1), sample=True),
    adapt("avg", 3, (2, 2, 2), shape=(2, 3, 8, 8, 8)),
    adapt("avg", 3, (3, 5, 2)),
    adapt("avg", 3, (12, 11, 7)),
    adapt("max", 1, (3,)),
    adapt("max", 2, (1, 1)),
    adapt("max", 2, (7, 4)),
    adapt("max", 3, (1, 1, 1)),
    adapt("max", 3, (4, 3, 5), sample=True),
    resize("nearest_2", 1, "nearest", scaled(1, 2), scale_factor=2),
    resize("nearest_size", 2, "nearest", (17, 20), size=(17, 20)),
    resize("nearest_half", 2, "nearest", scaled(2, 0.5), scale_factor=0.5),
    resize(
        "nearest_kept", 2, "nearest", scaled(2, 1.07), scale_factor=1.07
    ),  # the size stays: torch forgets the factor
    resize("nearest_exact_size", 2, "nearest-exact", (17, 8), size=(17, 8)),
    resize("nearest_2", 3, "nearest", scaled(3, 2), scale_factor=2, sample=True),
    resize("linear_2", 1, "linear", scaled(1, 2), scale_factor=2),
    resize("bilinear_2", 2, "bilinear", scaled(2, 2), scale_factor=2, sample=True),
    resize("bilinear_size_down", 2, "bilinear", (7, 6), size=(7, 6)),
    resize("bilinear_aligned", 2, "bilinear", (23, 19), size=(23, 19), align_corners=True),
    resize("bilinear_factor", 2, "bilinear", scaled(2, 1.5), scale_factor=1.5, recompute_scale_factor=True),
    resize("trilinear_2", 3, "trilinear", scaled(3, 2), scale_factor=2, sample=True),
    resize("trilinear_2_aligned", 3, "trilinear", scaled(3, 2), scale_factor=2, align_corners=True),
    resize("trilinear_size", 3, "trilinear", (13, 5, 11), size=(13, 5, 11)),
]
