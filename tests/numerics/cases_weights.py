"""Convolutions whose weights are computed, shared or scaled, and the rarer forms and combinations of convolution."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, conv, padded, per_dim, transposed
from torch import Tensor, nn
from torch.nn.utils import parametrizations

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
SMALL = {1: (2, 4, 5), 2: (2, 4, 5, 3), 3: (2, 4, 3, 5, 2)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# the gradient of a computed weight is no parameter's: its sum over the ranks counts with the exchanges
WEIGHT = Bound((conv(2, 3, 1, 1),), statistics=lambda shapes: 4 * 6 * 4 * 9)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao and others 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Shared(nn.Module):
    """One weight as a convolution, twice, dilated, and as a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.tanh(self.down(x))) + self.down(x * 2)
        return y + F.conv2d(x, self.down.weight, dilation=2, padding=2)


class Dynamic(nn.Module):
    """A kernel computed from the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(4, 36)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(x.mean((0, 2, 3))).view(4, 1, 3, 3), padding=1, groups=4)


class Sized(nn.Module):
    """A transposed convolution that is told its output size."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.up = TRANSPOSED[ndim](4, 5, 3, stride=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[(size - 1) * 3 + 3 for size in x.shape[2:]])


def old_style(wrap: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """The older hooks; made without history, so that the module can be copied."""

    def make() -> nn.Module:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return wrap(nn.Conv2d(4, 6, 3, padding=1))

    return make


def computed(name: str, wrap: Callable[..., nn.Module], **options: Any) -> Case:
    return Case(f"conv2d_{name}", lambda: wrap(nn.Conv2d(4, 6, 3, padding=1)), (Input(SIZES[2]),), WEIGHT, **options)


def convolution(name: str, ndim: int, k: Any, small: bool = False, **o: Any) -> Case:
    shape, s, p, d = (SMALL if small else SIZES)[ndim], o.get("stride", 1), o.get("padding", 0), o.get("dilation", 1)
    mode, stages = o.get("padding_mode", "zeros"), (conv(ndim, k, s, p, d),)
    if mode != "zeros":
        reach = [dd * (kk - 1) for kk, dd in zip(per_dim(k, ndim), per_dim(d, ndim), strict=True)]
        ends = [(r // 2, r - r // 2) for r in reach] if p == "same" else [(w, w) for w in per_dim(p, ndim)]
        stages = (*(padded(2 + i, *end, mode) for i, end in enumerate(ends)), conv(ndim, k, s, 0, d))
    make = lambda: CONV[ndim](4, 8, k, **o)  # noqa: E731
    return Case(f"conv{ndim}d_{name}", make, (Input(shape),), Bound(stages))


def transpose(name: str, ndim: int, k: Any, small: bool = False, **o: Any) -> Case:
    names = ("stride", "padding", "output_padding", "dilation")
    stage = transposed(ndim, k, *(o.get(key, key in ("stride", "dilation")) * 1 for key in names))
    make = lambda: TRANSPOSED[ndim](4, 8, k, **o)  # noqa: E731
    return Case(f"conv_transpose{ndim}d_{name}", make, (Input((SMALL if small else SIZES)[ndim]),), Bound((stage,)))


def plain_weight(name: str, call: Callable[..., Tensor], shape: tuple[int, ...], bound: Bound, ndim: int = 2) -> Case:
    return Case(name, lambda: Call(call), (Input(SIZES[ndim]), Input(shape, plain=True)), bound)


CASES = [
    Case("conv2d_weight_standardised", lambda: Standardised(4, 6, 3, padding=1), (Input(SIZES[2]),), WEIGHT),
    computed("weight_norm", parametrizations.weight_norm),
    computed("weight_norm_whole", lambda module: parametrizations.weight_norm(module, dim=None)),
    computed("spectral_norm", parametrizations.spectral_norm, steps=3),
    computed("spectral_norm_eval", parametrizations.spectral_norm, training=False),
    computed("orthogonal", parametrizations.orthogonal),
    Case("conv2d_weight_norm_old", old_style(torch.nn.utils.weight_norm), (Input(SIZES[2]),), WEIGHT),
    Case("conv2d_spectral_norm_old", old_style(torch.nn.utils.spectral_norm), (Input(SIZES[2]),), WEIGHT, steps=3),
    Case(
        "conv_transpose3d_spectral_norm",
        lambda: parametrizations.spectral_norm(nn.ConvTranspose3d(4, 6, 2, stride=2)),
        (Input(SIZES[3]),),
        Bound(statistics=lambda shapes: 2 * 4 * 6 * 8),
        steps=2,
    ),
    Case("conv2d_weight_in_four_uses", Shared, (Input(SIZES[2]),)),
    Case("conv2d_kernel_from_input", Dynamic, (Input(SIZES[2]),), WEIGHT),
    *(Case(f"conv_transpose{n}d_output_size", lambda n=n: Sized(n), (Input(SIZES[n]),)) for n in (1, 2, 3)),
    convolution("k2_s5_d3", 1, 2, stride=5, dilation=3, padding=2),
    convolution("k5_p9_more_than_needed", 1, 5, padding=9),
    convolution("k4_same_small", 1, 4, True, padding="same", dilation=2),
    convolution("k4_circular", 1, 4, padding=3, padding_mode="circular", dilation=2, stride=2),
    convolution("k4x2_same_d3x2", 2, (4, 2), padding="same", dilation=(3, 2)),
    convolution("k3x1_s1x4_d4x1", 2, (3, 1), stride=(1, 4), dilation=(4, 1), padding=(5, 3)),
    convolution("k4_reflect_d2", 2, 4, padding=(4, 5), padding_mode="reflect", dilation=(1, 2), stride=(3, 1)),
    convolution("k4_same_circular", 2, 4, padding="same", padding_mode="circular"),
    convolution("k2x5_same_replicate", 2, (2, 5), padding="same", padding_mode="replicate"),
    convolution("k3_small_groups", 2, 3, True, padding=4, stride=(4, 3), groups=4),
    convolution("k2x1x4_mixed", 3, (2, 1, 4), stride=(3, 2, 1), dilation=(2, 1, 2), padding=(2, 1, 3), groups=2),
    convolution("k4_same_d2", 3, 4, padding="same", dilation=(2, 1, 1), groups=4),
    convolution("k3_reflect_s2", 3, (3, 2, 3), stride=2, padding=(2, 1, 1), padding_mode="reflect"),
    convolution("k3_circular_small", 3, 3, True, padding=(2, 1, 1), padding_mode="circular"),
    convolution("k2_p3_small", 3, 2, True, padding=3, stride=(1, 4, 2)),
    transpose("k1_s5_op4", 1, 1, stride=5, output_padding=4),
    transpose("k5_p5_d2", 1, 5, padding=5, dilation=2),
    transpose("depthwise", 2, (4, 3), stride=(2, 3), padding=(1, 2), output_padding=(0, 2), groups=4),
    transpose("k3_s1x5_d3", 2, 3, stride=(1, 5), dilation=(3, 1), padding=(4, 1), output_padding=(2, 3)),
    transpose("k4_small", 2, 4, True, stride=3, padding=2, bias=False),
    transpose("depthwise", 3, 3, stride=(2, 1, 3), padding=1, output_padding=(1, 0, 2), groups=4),
    transpose("k2x3x1_d2", 3, (2, 3, 1), dilation=(3, 2, 1), stride=(2, 1, 2), padding=(1, 2, 0)),
    transpose("k3_small", 3, 3, True, stride=2, padding=2, output_padding=1),
    plain_weight(
        "convolution_general",
        lambda x, w: torch.convolution(x, w, None, [1, 2], [1, 0], [1, 1], False, [0, 0], 1),
        *((4, 4, 3, 2), Bound((conv(2, (3, 2), (1, 2), (1, 0)),))),
    ),
    plain_weight(
        "convolution_general_transposed",
        lambda x, w: torch.convolution(x, w, None, [1, 2], [1, 0], [1, 1], True, [0, 1], 1),
        *((4, 4, 3, 2), Bound((transposed(2, (3, 2), (1, 2), (1, 0), (0, 1)),))),
    ),
    plain_weight(
        "conv_tbc",
        lambda x, w: torch.conv_tbc(x.permute(2, 0, 1).contiguous(), w, x.new_zeros(5), 1),
        *((3, 4, 5), Bound((conv(1, 3, 1, 1),)), 1),
    ),
    plain_weight(
        "conv_transpose2d_blur",
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, groups=4),
        *((4, 1, 4, 4), Bound((transposed(2, 4, 2, 1),))),
    ),
]
