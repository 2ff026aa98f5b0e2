"""Corners: dims of size 1, fewer positions than ranks, one sample over several, axes that a tensor does not have,
plain inputs, reductions used further, odd memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases_shape import Head
from harness import Call, Case, Input
from harness_bounds import Bound, conv
from torch import Tensor, nn

THIN = (2, 4, 1, 6, 5)  # one plane
FEW = (2, 4, 3, 2, 6)  # fewer planes than ranks
SINGLE = (1, 4, 9, 6, 5)  # one sample
FLAT = (3, 4, 11, 13)  # no depth
LABELS = {"classes": 5, "kind": "classes", "layout": "NDHW"}


def stack(channels: int = 4) -> nn.Module:
    """Most of a network in little: every kind of exchange once."""
    return nn.Sequential(
        nn.Conv3d(channels, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 1, 1)),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose3d(4, 4, 2, stride=2),
        nn.LeakyReLU(),
        nn.MaxPool3d(2),
        nn.InstanceNorm3d(4, affine=True),
        nn.AvgPool3d((1, 1, 3), stride=1, padding=(0, 0, 1)),
    )


class Criterion(nn.Module):
    """A network and its loss in one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.network(x)
        return F.cross_entropy(torch.cat([y, y[:, :1] * 2], 1), target)


class Bottleneck(nn.Module):
    """A global mean used further: through layers, a norm over the batch, and back to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3, 4))
        hidden = torch.relu(self.norm(self.one(pooled)))
        peak = x.amax((2, 3, 4)).softmax(1)
        return x * torch.sigmoid(self.two(hidden))[:, :, None, None, None] + (peak * pooled).sum() * x.std()


def summands(x: Tensor) -> Tensor:
    """Non-linear work on sums over a split dim."""
    s = x.sum((2, 3))
    return torch.exp(s / 50) * s.abs().sqrt() + torch.where(s > 0, s, s * s) + torch.cat([s, s], 1)[:, 2:8] + s.flip(1)


def positions(x: Tensor) -> Tensor:
    """Coordinates as extra channels, as CoordConv builds them from the shape."""
    grids = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[2:]), indexing="ij")
    return torch.cat([x, torch.stack(grids).expand(x.shape[0], -1, -1, -1, -1)], 1)


def loop(x: Tensor) -> Tensor:
    """Python around tensors: lengths, iteration, numbers of elements, samples one by one."""
    parts = [sample * (index + 1) for index, sample in enumerate(x)]
    y = torch.stack(parts)
    return y / y.numel() * len(x) + x.size(2) + x.dim() * x.new_ones(())


def odd_memory(x: Tensor) -> Tensor:
    y = x.transpose(1, 2).contiguous().transpose(1, 2) + x.expand(x.shape)
    return F.max_pool3d(y, 2) + F.conv3d(y, y.new_ones(4, 4, 2, 2, 2), stride=2)


def dims(n: int, *shape: int, **options: Any) -> Input:
    return Input((n, *shape), **options)


def case(name: str, make: Callable[[], nn.Module], *inputs: Input, bound: Bound | None = None, **o: Any) -> Case:
    return Case(name, make, inputs, bound or Bound(whole=True, statistics=lambda shapes: 4000), **o)


def criterion(name: str, shape: tuple[int, ...], **options: Any) -> Case:
    target = Input((shape[0], *shape[2:]), **LABELS)
    return case(name, lambda: Criterion(stack()), Input(shape), target, **options)


CASES = [
    case("thin_stack", stack, Input((2, 4, 2, 6, 5)), sample=True),
    case(
        "thin_conv", lambda: nn.Conv3d(4, 5, 3, padding=1), Input(THIN), bound=Bound((conv(3, 3, 1, 1),)), sample=True
    ),
    case("thin_elementwise", lambda: Call(lambda x, w: (x * w + x).clamp(min=0) + x.mean()), Input(THIN), Input(THIN)),
    case("thin_broadcast", lambda: Call(lambda x, y: x * y + y), Input((2, 4, 9, 6, 5)), Input(THIN)),
    case("thin_plain", lambda: Call(lambda x, w: x * w - w), Input(THIN), Input(THIN, plain=True)),
    case("thin_expand", lambda: Call(lambda x: x.expand(-1, -1, 7, -1, -1) * 2), Input(THIN)),
    case("thin_squeeze", lambda: Call(lambda x: x.squeeze(2) * 2), Input(THIN)),
    case("thin_norm", lambda: nn.BatchNorm3d(4), Input(THIN), steps=2),
    case("thin_upsample", lambda: nn.Upsample(scale_factor=2, mode="trilinear"), Input(THIN)),
    case(
        "thin_reduce", lambda: Call(lambda x: (x.sum(2), x.amax(2), x.softmax(2), x.var(2, correction=0))), Input(THIN)
    ),
    case("few_stack", stack, Input(FEW), sample=True),
    criterion("few_loss", (2, 4, 2, 2, 6), sample=True),
    criterion("one_sample_loss", SINGLE, plans=("n2d2", "n2h2", "d4")),
    case("one_sample_stack", stack, Input(SINGLE), plans=("n2d2", "n4", "n2h2")),
    case("one_sample_head", Head, Input((1, 4, 9, 10, 7)), plans=("n2d2", "n4")),
    case("one_sample_batch_norm", lambda: nn.BatchNorm3d(4), Input(SINGLE), plans=("n2d2", "n4"), steps=2),
    case(
        "one_sample_elementwise",
        lambda: Call(lambda x, w: x * w + x.mean(0)),
        Input(SINGLE),
        Input(SINGLE, plain=True),
        plans=("n2d2", "n4"),
    ),
    case(
        "no_depth_conv",
        lambda: nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)),
        Input(FLAT),
        plans=("d4", "d2h2", "n2d2"),
    ),
    case("no_depth_loss", lambda: Call(lambda x: (x * x).mean() + x.std()), Input(FLAT), plans=("d4", "d2h2")),
    case("no_depth_linear", lambda: nn.Linear(5, 3), Input((6, 5)), plans=("d4", "n2d2", "d2h2")),
    case("no_space_norm", lambda: nn.BatchNorm1d(5), Input((6, 5)), plans=("d4", "n2d2")),
    case("no_depth_dropout", lambda: nn.Dropout(0.4), Input(FLAT), plans=("d4", "d2h2"), reference="one"),
    case(
        "plain_input",
        lambda: nn.Sequential(nn.Conv3d(4, 5, 3, padding=1), nn.BatchNorm3d(5)),
        Input((2, 4, 9, 6, 5), plain=True),
    ),
    case(
        "plain_and_split",
        lambda: Call(lambda a, b: torch.cat([a, b], 1) * 2),
        Input((2, 4, 9, 6, 5)),
        Input((2, 3, 9, 6, 5), plain=True),
    ),
    case("plain_target_thin", lambda: nn.MSELoss(), Input(THIN), Input(THIN, plain=True)),
    case("bottleneck", Bottleneck, dims(3, 4, 9, 10, 7), sample=True),
    case("summands", lambda: Call(summands), dims(2, 6, 11, 13)),
    case("coordinates", lambda: Call(positions), dims(2, 4, 9, 10, 7)),
    case("python_loop", lambda: Call(loop), dims(3, 4, 9, 10, 7), plans=("d4", "h4", "d2h2")),
    case("odd_memory", lambda: Call(odd_memory), dims(2, 4, 9, 10, 7)),
    case(
        "flatten_then_sum",
        lambda: Call(lambda x: x.flatten(2).sum(-1) + x.reshape(2, 4, -1).amax(-1)),
        dims(2, 4, 9, 10, 7),
    ),
    case(
        "float_and_integer",
        lambda: Call(lambda x: x * (x > 0).long() + (x * 3).int().float().sum() * x.bool()),
        dims(2, 4, 11, 13),
    ),
]
