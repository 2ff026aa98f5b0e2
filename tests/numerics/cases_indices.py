"""Positions: pooling that returns them, unpooling that consumes them, pooling with random windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, Stage, conv, conv_out, transposed
from torch import Tensor, nn

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
SMALL = {1: (2, 3, 5), 2: (2, 3, 5, 3), 3: (2, 3, 3, 5, 2)}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
UNPOOL = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def pooled(
    name: str, ndim: int, k: Any, s: Any = None, p: Any = 0, d: Any = 1, ceil: bool = False, *, small: bool = False
) -> Case:
    """Values and global positions of one pooling: little more than its window travels."""
    call = Call(lambda x: POOL[ndim](x, k, s, p, d, ceil, True))
    shape = (SMALL if small else SIZES)[ndim]
    return Case(
        f"max_pool{ndim}d_indices_{name}", lambda: call, (Input(shape),), Bound((conv(ndim, k, s or k, p, d, ceil),))
    )


def adaptive(ndim: int, *out: int) -> Case:
    call = Call(lambda x: ADAPTIVE[ndim](x, out, True))
    return Case(f"adaptive_max_pool{ndim}d_indices_{'x'.join(map(str, out))}", lambda: call, (Input(SIZES[ndim]),))


def unpooling(shape: tuple[int, ...], k: int, p: int = 0) -> Bound:
    """The windows of both ways; positions travel as values do, and a range of positions for each plane."""
    ndim, sizes = len(shape) - 2, [conv_out(n, k, k, p, p, 1) for n in shape[2:]]
    plane = max(math.prod(sizes) // size for size in sizes) * shape[0] * shape[1]
    back = Stage(transposed(ndim, k, k, p).needs, tuple(lambda n, size=size: size for size in shape[2:]))
    return Bound((conv(ndim, k, k, p), back), statistics=lambda shapes: 2 * sum(sizes) + plane)


def there_and_back(
    name: str,
    ndim: int,
    k: int = 2,
    p: int = 0,
    *,
    small: bool = False,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """Pooling, work on the values, and unpooling to the size of before; `change` moves the positions about."""
    shape = (SMALL if small else SIZES)[ndim]

    def call(x: Tensor) -> Tensor:
        y, where = POOL[ndim](x, k, k, p, return_indices=True)
        return UNPOOL[ndim](torch.tanh(y) * 2, change(where) if change else where, k, k, p, output_size=x.shape)

    bound = None if change else unpooling(shape, k, p)
    return Case(f"max_unpool{ndim}d_{name}", lambda: Call(call), (Input(shape),), bound)


class SegNet(nn.Module):
    """Two levels down and up along the positions of the way down."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.down = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[ndim - 1](2, return_indices=True)
        self.up = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)[ndim - 1](2)
        self.first, self.second = CONV[ndim](4, 4, 3, padding=1), CONV[ndim](4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, i = self.down(self.first(x))
        b, j = self.down(self.second(a))
        y = self.up(self.first(b), j, output_size=a.shape)
        return self.up(self.second(y), i, output_size=x.shape)


def everywhere_low(x: Tensor) -> Any:
    """Windows that hold nothing but −inf: torch names the first position of each."""
    y, where = POOL[2](x.masked_fill(x < 1.2, -math.inf), 3, 2, 1, 1, True, True)
    return y.clamp(min=-9), where


CASES = [
    pooled("k2", 1, 2),
    pooled("k3_s1_p1_d2_ceil", 1, 3, 1, 1, 2, True),
    pooled("k4_small", 1, 4, 4, 2, small=True),
    pooled("k3_s2_p1", 2, 3, 2, 1),
    pooled("k2x3_gap_ceil", 2, (2, 3), (3, 4), (1, 1), 1, True),
    pooled("k2x3_d2", 2, (2, 3), (1, 4), (1, 0), 2),
    pooled("k3_small", 2, 3, 1, 1, small=True),
    pooled("k2", 3, 2),
    pooled("k3_s2_p1_ceil", 3, 3, 2, 1, 1, True),
    pooled("k2x3x1_small", 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), small=True),
    Case("max_pool2d_indices_all_low", lambda: Call(everywhere_low), (Input(SIZES[2]),), grad=False),
    Case(
        "max_pool2d_indices_unbatched",
        lambda: Call(lambda x: F.max_pool2d(x[0], 2, return_indices=True)),
        (Input(SIZES[2]),),
    ),
    adaptive(1, 1),
    adaptive(1, 5),
    adaptive(2, 1, 1),
    adaptive(2, 3, 7),
    adaptive(2, 13, 2),
    adaptive(3, 1, 1, 1),
    adaptive(3, 2, 12, 3),
    *(there_and_back("k2", ndim) for ndim in (1, 2, 3)),
    *(there_and_back("k3_p1", ndim, 3, 1) for ndim in (1, 2, 3)),
    *(there_and_back("small", ndim, small=True) for ndim in (1, 2, 3)),
    *(there_and_back("flipped", ndim, change=lambda where: where.flip(2)) for ndim in (1, 2, 3)),
    there_and_back("all_to_one_plane", 2, change=lambda where: where % 13 + 13 * 4),
    Case(
        "max_unpool1d_default_size",
        lambda: Call(lambda x: F.max_unpool1d(*F.max_pool1d(x, 3, return_indices=True), 3)),
        (Input(SIZES[1]),),
    ),
    Case(
        "max_unpool2d_unbatched",
        lambda: Call(lambda x: F.max_unpool2d(*F.max_pool2d(x[0], 2, return_indices=True), 2, output_size=x.shape[2:])),
        (Input(SIZES[2]),),
    ),
    Case(
        "max_unpool2d_of_adaptive",
        lambda: Call(lambda x: F.max_unpool2d(*F.adaptive_max_pool2d(x, (4, 4), True), (3, 4), output_size=(11, 13))),
        (Input(SIZES[2]),),
    ),
    Case(
        "max_unpool2d_anywhere",
        lambda: Call(lambda x, where: F.max_unpool2d(x, where, 2)),
        (Input(SIZES[2]), Input(SIZES[2], kind="classes", classes=22 * 26)),
    ),
    Case("segnet2d", lambda: SegNet(2), (Input(SIZES[2]),), sample=True),
    Case("segnet3d", lambda: SegNet(3), (Input(SIZES[3]),), sample=True),
    Case(
        "fractional_max_pool2d_drawn",
        lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5),
        (Input(SIZES[2]),),
        reference="one",
        strict=False,
    ),
]
