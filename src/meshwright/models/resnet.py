"""ResNet-18 and ResNet-50 for images and volumes: plain modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Dims = Literal[2, 3]
_KINDS: dict[int, tuple[Any, Any, Any, Any]] = {
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
}


def _unit(dims: Dims, channels: int, width: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution and batch norm, with ReLU but at the end of a block."""
    conv, norm, _, _ = _KINDS[dims]
    layers = [conv(channels, width, kernel, stride, kernel // 2, bias=False), norm(width)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class Block(nn.Module):
    """Two 3 × 3 convolutions, or a bottleneck of 1, 3 and 1 whose output is 4 × as wide, and the shortcut."""

    def __init__(self, dims: Dims, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        wide = 4 * width if bottleneck else width
        if bottleneck:
            body = [_unit(dims, channels, width, 1), _unit(dims, width, width, 3, stride)]
            body.append(_unit(dims, width, wide, 1, relu=False))
        else:
            body = [_unit(dims, channels, width, 3, stride), _unit(dims, width, wide, 3, relu=False)]
        self.body = nn.Sequential(*body)
        same = stride == 1 and channels == wide
        self.shortcut = nn.Identity() if same else _unit(dims, channels, wide, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """[N, in_channels, *space] → logits [N, classes]; four levels of `base` · 2^i channels.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; the stride of a bottleneck is
    in its 3 × 3 convolution, as is usual now. With `dims=3` every kernel gains one dim.
    """

    def __init__(
        self,
        dims: Dims,
        blocks: Sequence[int],
        bottleneck: bool,
        in_channels: int = 3,
        classes: int = 1000,
        base: int = 64,
    ) -> None:
        super().__init__()
        _, _, pool, mean = _KINDS[dims]
        self.stem = nn.Sequential(_unit(dims, in_channels, base, 7, 2), pool(3, 2, 1))
        levels: list[nn.Module] = []
        channels = base
        for level, count in enumerate(blocks):
            for index in range(count):
                levels.append(Block(dims, channels, base << level, 2 if level and not index else 1, bottleneck))
                channels = (base << level) * (4 if bottleneck else 1)
        self.levels = nn.Sequential(*levels)
        self.mean, self.head = mean(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mean(self.levels(self.stem(x))).flatten(1))


def resnet18(dims: Dims = 2, **options: Any) -> ResNet:
    """11.7 million parameters for images of 3 channels and 1,000 classes."""
    return ResNet(dims, (2, 2, 2, 2), False, **options)


def resnet50(dims: Dims = 2, **options: Any) -> ResNet:
    """25.6 million parameters for images of 3 channels and 1,000 classes."""
    return ResNet(dims, (3, 4, 6, 3), True, **options)
