"""The 3-D U-Net of the published measurements: 19.07 M parameters, 31.3 TFlop forward per 256³ sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DOWN = ((32, 64), (64, 128), (128, 256))
_BOTTOM = (256, 512)
_UP = ((256, 256), (128, 128), (64, 64))


def _block(channels: int, widths: tuple[int, int]) -> nn.Sequential:
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
    the counts are 19,070,563 parameters and 31.26 TFlop (2 per multiply and add) for one 256³ sample.
    """

    def __init__(self, in_channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        channels = in_channels
        for widths in _DOWN:
            self.down.append(_block(channels, widths))
            channels = widths[-1]
        self.pool = nn.MaxPool3d(2)
        self.bottom = _block(channels, _BOTTOM)
        channels = _BOTTOM[-1]
        self.rise = nn.ModuleList()
        self.up = nn.ModuleList()
        for widths, (_, skip) in zip(_UP, reversed(_DOWN), strict=True):
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
