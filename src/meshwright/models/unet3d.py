"""The 3-D U-Net of the published measurements: 19.07 M parameters, 31.3 TFlop forward per 256³ sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_DOWN = ((1, 2), (2, 4), (4, 8))  # channels in units of `base`
_BOTTOM = (8, 16)
_UP = ((8, 8), (4, 4), (2, 2))


def _block(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Two 3³ convolutions without bias, each with batch norm and ReLU; the sizes stay."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv3d(channels, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


class UNet3D(nn.Module):
    """[N, in_channels, D, H, W] → logits [N, classes, D, H, W]; D, H and W are multiples of 8.

    Structure and counts: Oyama et al., "The Case for Strong Scaling in Deep Learning: Training Large 3D CNNs with
    Hybrid Parallelism", IEEE TPDS 32(7). Transposed convolutions keep the number of channels and have no bias, so
    the counts are 19,070,563 parameters and 31.26 TFlop (2 per multiply and add) for one 256³ sample. `base` is the
    number of channels of the first convolution, of which all others are multiples; 32 is the published one.

    Raises `ValueError` for fewer than one channel.
    """

    def __init__(self, in_channels: int = 1, classes: int = 3, base: int = 32) -> None:
        super().__init__()
        if base < 1:
            raise ValueError(f"base = {base}: the first convolution needs at least one channel")
        self.down = nn.ModuleList()
        down, bottom, up = ([[base * n for n in pair] for pair in part] for part in (_DOWN, (_BOTTOM,), _UP))
        channels = in_channels
        for widths in down:
            self.down.append(_block(channels, widths))
            channels = widths[-1]
        self.pool = nn.MaxPool3d(2)
        self.bottom = _block(channels, bottom[0])
        channels = bottom[0][-1]
        self.rise = nn.ModuleList()
        self.up = nn.ModuleList()
        for widths, (_, skip) in zip(up, reversed(down), strict=True):
            self.rise.append(nn.ConvTranspose3d(channels, channels, 2, stride=2, bias=False))
            self.up.append(_block(channels + skip, widths))
            channels = widths[-1]
        self.head = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for rise, block, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            x = block(torch.cat((skip, rise(x)), dim=1))
        return self.head(x)
