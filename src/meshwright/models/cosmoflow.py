"""CosmoFlow: from a cube of dark matter to the parameters of its universe. 9.44 M parameters at every input size."""

from __future__ import annotations

from torch import Tensor, nn

_MULTIPLES = (1, 2, 4, 8, 16, 16, 16)  # channels of the seven convolutions, in units of `width`
_STRIDED = 3  # the fourth convolution has stride 2
_LEAST, _MOST = 16, 512  # voxels a side: 16 needs two pools; there are no more than seven convolutions to pool behind


def pools(input_size: int) -> int:
    """How many of the seven pools are kept so that 2³ positions remain: 7, 6, 5 at 512³, 256³, 128³ as published, then
    4, 3, 2 at 64³, 32³, 16³ by the same rule. Raises `ValueError` for a size that does not halve to 2."""
    if not _LEAST <= input_size <= _MOST or input_size & (input_size - 1):
        known = ", ".join(str(_LEAST << i) for i in range((_MOST // _LEAST).bit_length()))
        raise ValueError(f"CosmoFlow is defined for cubes of {known} voxels a side, not {input_size}")
    return input_size.bit_length() - 3


class CosmoFlow(nn.Module):
    """[N, in_channels, S, S, S] → [N, outputs], S = `input_size`.

    Seven 3³ convolutions without bias, each with leaky ReLU and average pooling k3 s2 p1 (the last pools are left out
    below 512³, so that 2³ positions remain: `pools`), then fully connected layers of 2048, 256 and `outputs` with
    dropout.
    `batch_norm` puts a batch norm behind each convolution; `keep` is the probability to keep a feature.
    The published 55.55 / 443.8 / 3550 GFlop per sample at 128³ / 256³ / 512³ are 3 × the forward pass of the
    convolutions; the fully connected layers add 0.03.

    Source: Oyama et al., "The Case for Strong Scaling in Deep Learning", IEEE TPDS 32(7).
    Raises `ValueError` for a size that is no power of two from 16 to 512.
    """

    def __init__(
        self,
        input_size: int,
        in_channels: int = 4,
        width: int = 16,
        batch_norm: bool = False,
        outputs: int = 4,
        keep: float = 0.8,
    ) -> None:
        super().__init__()
        kept = pools(input_size)
        layers: list[nn.Module] = []
        channels = in_channels
        for index, multiple in enumerate(_MULTIPLES):
            stride = 2 if index == _STRIDED else 1
            layers.append(nn.Conv3d(channels, width * multiple, 3, stride=stride, padding=1, bias=False))
            channels = width * multiple
            if batch_norm:
                layers.append(nn.BatchNorm3d(channels))
            layers.append(nn.LeakyReLU())
            if index < kept:
                layers.append(nn.AvgPool3d(3, stride=2, padding=1))
        self.features = nn.Sequential(*layers)
        self.regressor = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * 2**3, 2048),
            nn.LeakyReLU(),
            nn.Dropout(1 - keep),
            nn.Linear(2048, 256),
            nn.LeakyReLU(),
            nn.Dropout(1 - keep),
            nn.Linear(256, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.regressor(self.features(x))
