"""A small 3-D U-Net for any volume: the network of the main job, and of every speed figure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]


def _norm(kind: Norm, width: int) -> list[nn.Module]:
    match kind:
        case "batch":
            return [nn.BatchNorm3d(width)]
        case "group":
            return [nn.GroupNorm(min(8, width), width)]
        case "none":
            return []
    raise ValueError(f"norm {kind!r} is not known; choose 'batch', 'group' or 'none'")


def _block(channels: int, width: int, norm: Norm) -> nn.Sequential:
    """Two 3³ convolutions with norm and ReLU. The bias is left out before a norm, which would subtract it again."""
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers.append(nn.Conv3d(inputs, width, 3, padding=1, bias=norm == "none"))
        layers += [*_norm(norm, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class SmallUNet(nn.Module):
    """[N, in_channels, D, H, W] → logits [N, classes, D, H, W].

    Level i has `base` · 2^i channels; between levels max pooling 2 and a transposed convolution k2 s2 to half the
    width. Any size of at least 2^(levels-1) works: pooling drops the odd last plane, and the transposed convolution
    is asked for the size of the skip (`output_size`), which appends that plane again. No copy, no extra operation,
    and when the volume is split only its last part is concerned.

    Raises `ValueError` for an unknown norm or fewer than one level.
    """

    def __init__(
        self, in_channels: int = 1, classes: int = 3, base: int = 8, levels: int = 3, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"a U-Net has at least one level, not {levels}")
        widths = [base * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            _block(channels, width, norm) for channels, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        self.rise = nn.ModuleList(nn.ConvTranspose3d(2 * width, width, 2, stride=2) for width in widths[-2::-1])
        self.up = nn.ModuleList(_block(2 * width, width, norm) for width in widths[-2::-1])
        self.head = nn.Conv3d(base, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()  # the deepest level is no skip
        for rise, block in zip(self.rise, self.up, strict=True):
            skip = skips.pop()
            x = block(torch.cat((skip, rise(x, output_size=skip.shape[2:])), dim=1))
        return self.head(x)


def benchmark_unet() -> SmallUNet:
    """The U-Net of every speed figure: 4 channels in, widths 16, 32, 64, bias, no norm, 3 channels out."""
    return SmallUNet(in_channels=4, classes=3, base=16, levels=3, norm="none")
