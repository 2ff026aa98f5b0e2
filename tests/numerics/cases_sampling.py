"""Resampling: bicubic and antialiased interpolation, pixel shuffles, and sampling at points that are data."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, Stage, conv, transposed
from torch import Tensor, nn

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
SMALL = (2, 4, 5, 3)
SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}


def smooth(reach: int, shrinks: bool, *out: int) -> Stage:
    """Output o of m reads `reach` positions on either side of its centre, more where `shrinks` widens the filter."""

    def needs(n: int, o: range, m: int) -> range:
        width = reach * (max(1.0, n / m) if shrinks else 1.0) + 1  # and one: the ratio may come from a factor
        low, high = (o[0] * (n - 1) / max(1, m - 1), (o[-1] + 1) * n / m)
        return range(max(0, math.floor(low - width)), min(n, math.ceil(high + width)))

    return Stage(tuple(lambda n, o, m=m: needs(n, o, m) for m in out), tuple(lambda n, m=m: m for m in out))


def resize(name: str, mode: str, out: tuple[int, int], *, shape: tuple[int, ...] = SIZES[2], **options: Any) -> Case:
    antialias = options.get("antialias", False)
    call, stage = Call(lambda x: F.interpolate(x, mode=mode, **options)), smooth(SUPPORT[mode], antialias, *out)
    kind = f"antialias_{mode}" if antialias else mode
    return Case(f"interpolate2d_{kind}_{name}", lambda: call, (Input(shape),), Bound((stage,), any_order=True))


def resizes(mode: str, antialias: bool) -> list[Case]:
    o: dict[str, Any] = {"antialias": antialias}
    return [
        resize("up", mode, (17, 20), size=(17, 20), **o),
        resize("down", mode, (6, 7), size=(6, 7), **o),
        resize("down_far", mode, (2, 3), size=(2, 3), **o),
        resize("aligned_up", mode, (23, 19), size=(23, 19), align_corners=True, **o),
        resize("aligned_down", mode, (5, 4), size=(5, 4), align_corners=True, **o),
        resize("factor_2", mode, (22, 26), scale_factor=2, **o),
        resize("factor_mixed", mode, (18, 7), scale_factor=(1.7, 0.6), **o),
        resize("factor_recomputed", mode, (18, 22), scale_factor=1.7, recompute_scale_factor=True, **o),
        resize("small", mode, (3, 2), size=(3, 2), shape=SMALL, **o),
        resize("small_up", mode, (9, 7), size=(9, 7), shape=SMALL, **o),
    ]


def whole_grid(n: int) -> Input:
    """Points anywhere, some of them outside."""
    shape = SIZES[n]
    return Input((shape[0], *(7, 6, 5)[:n], n), plain=True)


def near(x: Tensor, size: Any = None) -> Tensor:
    """The grid that leaves `x` where it is."""
    n = x.ndim - 2
    return F.affine_grid(
        torch.eye(n, n + 1, dtype=x.dtype).expand(x.shape[0], -1, -1), size or x.shape, align_corners=True
    )


def sampled(n: int, mode: str, padding: str, aligned: bool) -> Case:
    def call(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid * 0.9, mode, padding, aligned)

    name = f"grid_sample{n}d_{mode}_{padding}{'_aligned' * aligned}"
    return Case(name, lambda: Call(call), (Input(SIZES[n]), whole_grid(n)), Bound(whole=True, statistics=lambda s: 8))


def warp(n: int) -> Case:
    """A small deformation: nothing but a halo travels."""

    def call(x: Tensor, flow: Tensor) -> Tensor:
        size = torch.tensor(x.shape[2:][::-1], dtype=flow.dtype)
        grid = near(x) + torch.tanh(flow.movedim(1, -1)) * 2 / (size - 1)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=True)

    shape, bound = SIZES[n], Bound((conv(n, 7, 1, 3),), statistics=lambda shapes: 8)
    return Case(
        f"grid_sample{n}d_warp",
        lambda: Call(call),
        (Input(shape), Input((shape[0], n, *shape[2:]))),
        bound,
        sample=True,
    )


def learned(n: int) -> Case:
    """Points that are an activation, split over the output."""

    def call(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, torch.tanh(grid), align_corners=False, padding_mode="reflection")

    grid = Input((SIZES[n][0], *(9, 6, 5)[:n], n), layout=("NHWC", "NDHWC")[n - 2])
    return Case(f"grid_sample{n}d_learned", lambda: Call(call), (Input(SIZES[n]), grid))


class Transformer(nn.Module):
    """A spatial transformer network (Jaderberg and others 2015): the matrix is computed from the input."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.linear = n, nn.Linear(4, n * (n + 1))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.linear(x.mean(tuple(range(2, x.ndim)))).view(-1, self.n, self.n + 1)
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def outside(x: Tensor) -> Any:
    """Points that all lie outside, of which nothing is read, and all at one place."""
    grid = near(x)
    return F.grid_sample(x, grid + 3, align_corners=False), F.grid_sample(x, grid[:, :2] * 0.1, align_corners=False)


def one_sample(x: Tensor) -> Tensor:
    """All points at one place, and ranks without a sample."""
    return F.grid_sample(x, x.new_full((1, 5, 6, 2), 0.3), align_corners=True)


def shuffle(name: str, up: bool, shape: tuple[int, ...], r: int) -> Case:
    call = Call(lambda x: (F.pixel_shuffle if up else F.pixel_unshuffle)(x, r))
    stage = transposed(2, r, r) if up else conv(2, r, r)
    return Case(f"pixel_{name}", lambda: call, (Input(shape),), Bound((stage,)), sample=True)


PLAIN_GRID = [
    sampled(n, mode, padding, aligned)
    for n in (2, 3)
    for mode in ("bilinear", "nearest", *(["bicubic"] if n == 2 else []))
    for padding in ("zeros", "border", "reflection")
    for aligned in (False, True)
]
CASES = [
    *resizes("bicubic", False),
    *resizes("bilinear", True),
    *resizes("bicubic", True),
    *(
        [resize("down", "lanczos", (6, 7), size=(6, 7), antialias=True)]
        if "lanczos" in (F.interpolate.__doc__ or "")
        else []
    ),
    Case(
        "upsample_bicubic", lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True), (Input(SIZES[2]),)
    ),
    Case("upsampling_bilinear2d", lambda: nn.UpsamplingBilinear2d(size=(15, 20)), (Input(SIZES[2]),)),
    Case(
        "interpolate2d_bicubic_fp32",
        lambda: nn.Upsample(size=(17, 9), mode="bicubic"),
        (Input(SIZES[2]),),
        dtype=torch.float32,
    ),
    shuffle("shuffle_2", True, SIZES[2], 2),
    shuffle("shuffle_3", True, (2, 9, 5, 4), 3),
    shuffle("unshuffle_2", False, (2, 4, 10, 14), 2),
    shuffle("unshuffle_3", False, (2, 3, 12, 9), 3),
    Case("channel_shuffle", lambda: nn.ChannelShuffle(2), (Input(SIZES[3]),), Bound(), grad=False),
    *PLAIN_GRID,
    *(warp(n) for n in (2, 3)),
    *(learned(n) for n in (2, 3)),
    *(
        Case(
            f"spatial_transformer{n}d",
            lambda n=n: Transformer(n),
            (Input(SIZES[n]),),
            Bound(whole=True, statistics=lambda s: 3000),
        )
        for n in (2, 3)
    ),
    Case("grid_sample2d_one_sample", lambda: Call(one_sample), (Input((1, 4, 11, 13)),), plans=("h2w2", "n2h2", "n4")),
    Case(
        "grid_sample2d_whole_image",
        lambda: Call(lambda grid, image: F.grid_sample(image, grid.movedim(1, -1).tanh(), align_corners=True)),
        (Input((2, 2, 11, 13)), Input((2, 3, 6, 7), plain=True)),
    ),
    Case("grid_sample2d_outside", lambda: Call(outside), (Input(SIZES[2]),), Bound((conv(2, 9, 1, 4),), whole=True)),
]
