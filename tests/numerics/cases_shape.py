"""Padding, joining, slicing, renumbering dims, and elementwise work."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, moved, padded
from torch import Tensor, nn

X3 = Input((3, 4, 9, 10, 7))
X2 = Input((2, 4, 11, 13))
X1 = Input((3, 4, 21))
NOTHING = Bound()


def case(name: str, fn: Callable[..., Any], *inputs: Input, bound: Bound | None = NOTHING, **options: Any) -> Case:
    return Case(name, lambda: Call(fn), inputs, bound, **options)


def pad(name: str, x: Input, widths: tuple[int, ...], mode: str = "constant", value: float | None = None) -> Case:
    ndim = len(x.shape)
    stages = tuple(
        padded(ndim - 1 - i, widths[2 * i], widths[2 * i + 1], mode) for i in reversed(range(len(widths) // 2))
    )
    return case(f"pad_{name}", lambda t: F.pad(t, widths, mode, value), x, bound=Bound(stages, any_order=True))


def index(name: str, x: Input, key: Any, *slices: tuple[int, slice], sample: bool = False) -> Case:
    """`key` is applied; `slices` name the dims along which positions move."""
    stages = tuple(moved(dim, lambda n, s=s: list(range(n))[s]) for dim, s in slices)
    return case(f"index_{name}", lambda t: t[key], x, bound=Bound(stages), sample=sample)


def flip(name: str, x: Input, dims: Sequence[int]) -> Case:
    stages = tuple(moved(dim, lambda n: list(reversed(range(n)))) for dim in dims)
    return case(f"flip_{name}", lambda t: torch.flip(t, tuple(dims)), x, bound=Bound(stages))


def joined(first: int, second: int, dim: int) -> Bound:
    """Two tensors laid end to end: each position of the result comes from one of them."""
    head = moved(dim, lambda n: [*range(first), *[None] * second])
    tail = moved(dim, lambda n: [*[None] * first, *range(second)])
    return _Both(head, tail)


class _Both(Bound):
    """Inputs of different sizes, each with its own exchange."""

    def __init__(self, *each: Any) -> None:
        object.__setattr__(self, "each", each)

    def bytes(self, plan: Any, shapes: Sequence[tuple[int, ...]], layout: str | None, itemsize: int) -> int:
        pairs = zip(self.each, shapes, strict=True)
        return 2 * itemsize * sum(stage.received(plan, shape, layout) for stage, shape in pairs)


class Attention(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool3d(1)
        self.excite = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        scale = self.excite(self.squeeze(x).view(n, c))
        return x * scale.view(n, c, 1, 1, 1).expand_as(x)


class ChannelsLast(nn.Module):
    """A linear layer over channels, as in ConvNeXt and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Scales(nn.Module):
    """Parameters as a scalar, a vector per channel, and a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.randn(4))
        self.plane = nn.Parameter(torch.randn(11, 13))
        self.register_buffer("unit", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain + self.shift.view(1, -1, 1, 1)) * self.plane / self.unit


class Head(nn.Module):
    """Pool, flatten, fully connected: the end of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool3d(2)
        self.one = nn.Linear(4 * 4 * 5 * 3, 6)
        self.two = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(torch.flatten(self.pool(x), 1))))


def in_place(x: Tensor) -> Tensor:
    y = x * 1.5
    y.relu_()
    z = y + x
    z.add_(x).mul_(0.5)
    z[:, 0] += 1
    z += 2
    z[:, 1:3].mul_(3.0)
    return z


def in_place_after() -> list[Case]:
    """An in-place ReLU behind every kind of layer, as `nn.ReLU(inplace=True)` is used: legal where torch allows it."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv3d(4, 4, 3, padding=1),
        "conv_transpose": lambda: nn.ConvTranspose3d(4, 4, 2, stride=2),
        "conv_circular": lambda: nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"),
        "batch_norm": lambda: nn.BatchNorm3d(4),
        "group_norm": lambda: nn.GroupNorm(2, 4),
        "instance_norm": lambda: nn.InstanceNorm3d(4),
        "layer_norm": lambda: nn.LayerNorm((9, 10, 7)),
        "max_pool": lambda: nn.MaxPool3d(2),
        "avg_pool": lambda: nn.AvgPool3d(2),
        "adaptive": lambda: nn.AdaptiveAvgPool3d((3, 5, 2)),
        "upsample": lambda: nn.Upsample(scale_factor=2, mode="trilinear"),
        "pad": lambda: nn.ConstantPad3d(1, 0.5),
        "reflect": lambda: nn.ReflectionPad3d(1),
        "cat": lambda: Call(lambda x: torch.cat([x, x], 1)),
        "flip": lambda: Call(lambda x: x.flip(2)),
        "flatten": lambda: nn.Sequential(nn.Conv3d(4, 2, 1), nn.Flatten(), nn.Linear(1260, 3)),
        "slice": lambda: Call(lambda x: (x * 2)[:, 1:3]),
    }
    bound = Bound(whole=True, statistics=lambda shapes: 4 * 4 * 3 + 4)  # the layers themselves are bounded elsewhere
    return [
        Case(f"in_place_after_{name}", lambda make=make: nn.Sequential(make(), nn.ReLU(inplace=True)), (X3,), bound)
        for name, make in layers.items()
    ]


def masked_by_shape(x: Tensor) -> Tensor:
    """Plain tensors built from the global shape: a ramp along a split dim, a mask."""
    d, h = x.shape[2], x.shape[3]
    ramp = torch.linspace(-1, 1, d, dtype=x.dtype).view(1, 1, d, 1, 1)
    mask = torch.arange(h).view(1, 1, 1, h, 1) < h // 2
    return x * ramp + torch.where(mask, x, torch.zeros((), dtype=x.dtype))


def chain(x: Tensor) -> Tensor:
    y = F.leaky_relu(x, 0.1) + F.gelu(x) * torch.sigmoid(x) - F.softplus(x)
    y = torch.where(x > 0, y, -y).clamp(-3, 2)
    return torch.exp(-y.abs()) + y.pow(2).add(1).sqrt().log() + torch.maximum(x, y) + (x - 1.0) / (y * y + 1)


def activations(x: Tensor) -> Tensor:
    y = F.elu(x) + F.silu(x) + F.hardtanh(x) + F.relu6(x) + F.mish(x) + F.hardswish(x) + F.softsign(x)
    return (
        y + F.logsigmoid(x) + torch.tanh(x) + torch.erf(x) + torch.sin(x) * torch.cos(x) + x.reciprocal().clamp(-1, 1)
    )


def comparisons(x: Tensor) -> tuple[Tensor, ...]:
    return x > 0, (x > 0) & (x < 1), x.isnan(), x.sign(), x.round(), (x * 3).to(torch.int64), x.argmax(1)


CASES = [
    pad("constant", X3, (1, 2, 0, 3, 2, 1), value=1.5),
    pad("constant_one_side", X2, (0, 0, 3, 0)),
    pad("negative", X3, (-1, 0, -2, 1, 1, -3)),
    pad("reflect", X2, (2, 1, 3, 2), "reflect"),
    pad("reflect_3d", X3, (1, 1, 2, 1, 0, 2), "reflect"),
    pad("replicate", X3, (2, 0, 1, 3, 2, 2), "replicate"),
    pad("circular", X2, (3, 2, 1, 4), "circular"),
    pad("circular_3d", X3, (1, 1, 1, 1, 2, 2), "circular"),
    pad("channels", X2, (0, 0, 0, 0, 1, 2)),
    case("cat_channels", lambda a, b: torch.cat([a, b, a], 1), X3, Input((3, 2, 9, 10, 7)), sample=True),
    case("cat_depth", lambda a, b: torch.cat([a, b], 2), X3, Input((3, 4, 4, 10, 7)), bound=joined(9, 4, 2)),
    case("cat_height", lambda a, b: torch.cat([a, b], -2), X2, Input((2, 4, 6, 13)), bound=joined(11, 6, 2)),
    case("cat_batch", lambda a, b: torch.cat([a, b], 0), X2, Input((3, 4, 11, 13)), bound=joined(2, 3, 0)),
    case("stack", lambda a, b: torch.stack([a, b], 2).flatten(1, 2), X2, X2),
    index("crop_depth", X3, (slice(None), slice(None), slice(2, -1)), (2, slice(2, -1)), sample=True),
    index(
        "crop_all",
        X3,
        (..., slice(1, 8), slice(None, -2), slice(3, None)),
        (2, slice(1, 8)),
        (3, slice(None, -2)),
        (4, slice(3, None)),
    ),
    index("every_second", X2, (..., slice(None, None, 2)), (3, slice(None, None, 2)), sample=True),
    index("every_third_height", X2, (slice(None), slice(None), slice(1, None, 3)), (2, slice(1, None, 3))),
    index("channel_range", X3, (slice(None), slice(1, 3))),
    index("channel_list", X3, (slice(None), [2, 0, 0])),
    index("one_sample", X3, slice(1, 2), (0, slice(1, 2))),
    index("new_dim", X2, (slice(None), None)),
    case("select_channel", lambda x: x[:, 2], X3),
    case("select_depth", lambda x: x[:, :, 4], X3, bound=Bound(statistics=lambda s: s[0][0] * 4 * 10 * 7)),
    case("narrow_depth", lambda x: x.narrow(2, 3, 4), X3, bound=Bound((moved(2, lambda n: [3, 4, 5, 6]),))),
    case("chunk_channels", lambda x: torch.chunk(x, 2, 1), X3),
    case("split_unbind", lambda x: [*torch.split(x, [1, 3], 1), *x.unbind(1)], X2),
    flip("depth", X3, (2,)),
    flip("height_width", X2, (2, 3)),
    flip("all", X3, (2, 3, 4)),
    flip("channels", X3, (1,)),
    case("permute", lambda x: x.permute(0, 4, 2, 3, 1) * 2, X3),
    case("transpose", lambda x: x.transpose(2, 3).contiguous() + 1, X2),
    case("movedim", lambda x: torch.movedim(x, 1, -1), X2),
    case("flatten_space", lambda x: x.flatten(2), X2, bound=None),
    case("flatten_features", lambda x: x.flatten(1), X3, bound=Bound(whole=True)),
    case("reshape_depth_to_channels", lambda x: x.reshape(3, 4 * 9, 10, 7), X3, bound=None, plans=("h4", "n2d2", "d4")),
    case("reshape_channels", lambda x: x.reshape(3, 2, 2, 9, 10, 7).transpose(1, 2).reshape(3, 4, 9, 10, 7), X3),
    case("view_channels", lambda x: x.view(3, 2, 2, 9, 10, 7).sum(2), X3),
    case("unsqueeze_squeeze", lambda x: x.unsqueeze(2).squeeze(2).unsqueeze(-1), X2),
    case("expand", lambda x: x[:, :1].expand(-1, 5, -1, -1), X2),
    case("repeat_channels", lambda x: x.repeat(1, 2, 1, 1), X2),
    case("repeat_interleave_channels", lambda x: x.repeat_interleave(2, dim=1), X2),
    case("elementwise_chain", chain, X3, sample=True),
    case("elementwise_activations", activations, X2),
    case("elementwise_two", lambda a, b: a * b + a / (b * b + 1) - torch.atan2(a, b), X3, X3),
    case(  # the second operand is small: each rank may see all of it
        "elementwise_broadcast",
        lambda a, b: a * b + b,
        X2,
        Input((2, 1, 11, 1)),
        bound=Bound(statistics=lambda shapes: 4 * 2 * 11),
    ),
    case("elementwise_1d", lambda a: torch.tanh(a) * a, X1),
    case("comparisons", comparisons, X3, grad=False),
    case("in_place", in_place, X3, sample=True),
    *in_place_after(),
    case("operators_in_place", lambda x: operator.imul(operator.iadd(x + 0, 1), x), X2),
    case("masked_by_shape", masked_by_shape, X3),
    case("masked_fill", lambda x: x.masked_fill(x > 1, 0.0), X2),
    case("plain_vector", lambda x, w: x * w.view(1, -1, 1, 1, 1), X3, Input((4,), plain=True)),
    case("plain_volume", lambda x, w: (x + w) * w, X3, Input((9, 10, 7), plain=True)),
    case("factories", lambda x: x + torch.ones_like(x) * x.new_full((1,), 2.0) + torch.zeros_like(x), X2),
    case("clone_detach", lambda x: x.clone() * x.detach(), X2),
    case("dtype_round_trip", lambda x: x.float().double() + x.to(torch.float64), X2),
    Case("parameter_scales", Scales, (X2,), Bound(statistics=lambda shapes: 2 + 11 * 13)),  # the plane is cut
    case("pixel_shuffle_channels_only", lambda x: x.view(2, 2, 2, 11, 13).mean(1), X2),
    Case("linear_features", lambda: nn.Linear(5, 3), (Input((6, 5)),), NOTHING, plans=("n4",)),
    Case("linear_channels_last", ChannelsLast, (X3,), NOTHING, sample=True),
    Case("squeeze_excite", Attention, (X3,), Bound(statistics=lambda s: 4 * s[0][0] * s[0][1])),
    Case("classifier_head", Head, (X3,), None, sample=True),
    Case(
        "layout_named",
        lambda: Call(lambda x: x * 2 + x.mean(1, keepdim=True)),
        (Input((9, 4, 10, 7), layout="DCHW"),),
        Bound(),
        plans=("d4", "d2h2"),
    ),
]
