"""Networks that know nothing of Meshwright: MONAI's, and the field's usual blocks written plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.resnet import resnet18, resnet50

KINDS: dict[int, tuple[Any, Any]] = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


def unit(n: int, c: int, f: int, k: int, **options: Any) -> nn.Sequential:
    """Convolution that keeps the size (stride aside), batch norm, ReLU."""
    pad = options.get("dilation", 1) * (k // 2)
    conv, norm = KINDS[n]
    return nn.Sequential(conv(c, f, k, padding=pad, bias=False, **options), norm(f), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Four branches of different reach, joined along channels. Szegedy et al., CVPR 2015."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = unit(2, 3, 4, 1), nn.Sequential(unit(2, 3, 4, 1), unit(2, 4, 6, 3))
        self.five = nn.Sequential(
            unit(2, 3, 2, 1), nn.Conv2d(2, 4, (1, 7), padding=(0, 3)), nn.Conv2d(4, 4, (7, 1), padding=(3, 0))
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 4, 1))
        self.grow = unit(2, 18, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grow(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)).mean((2, 3))


class Dense(nn.Module):
    """Every layer sees all before it. Huang et al., CVPR 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(unit(3, 4 + 3 * i, 3, 3) for i in range(4))
        self.shrink = nn.Sequential(unit(3, 16, 8, 1), nn.AvgPool3d(2))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.shrink(torch.cat(features, 1))


class ConvNeXt(nn.Module):
    """Depthwise 7², layer norm over channels last, GELU, layer scale. Liu et al., CVPR 2022."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(0.5 * torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """ASPP: dilated branches and the image's mean, resized and joined. Chen et al., 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([unit(2, 3, 4, 1), *(unit(2, 3, 4, 3, dilation=d) for d in (2, 6, 12))])
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.ReLU())
        self.join = unit(2, 20, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.interpolate(self.image(x), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


class Excite(nn.Module):
    """Squeeze and excitation. Hu et al., CVPR 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        weights = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3, 4))))))
        return x * weights[:, :, None, None, None]


def _monai(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from monai.networks import nets

        model: nn.Module = getattr(nets, name)(*args, **options)
        for module in model.modules():  # their masks are tested elsewhere, against one rank
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model

    return make


@dataclass(frozen=True)
class Outside:
    """A network, its input, and the plans it is tried on."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    plans: tuple[str, ...]
    steps: int = 2  # of the optimiser


SPACE, PLANE = ("d2", "d2h2", "d4"), ("h2", "h2w2", "n2h2")
MODELS = {
    "resnet18_2d": Outside(lambda: resnet18(2, classes=5, base=4), (2, 3, 67, 64), PLANE),
    "resnet50_2d": Outside(lambda: resnet50(2, classes=5, base=4), (2, 3, 64, 64), PLANE),
    "resnet18_3d": Outside(lambda: resnet18(3, classes=5, base=4), (4, 3, 32, 33, 32), SPACE),
    "resnet50_3d": Outside(lambda: resnet50(3, classes=5, base=4), (4, 3, 32, 32, 32), SPACE),
    "inception": Outside(Inception, (2, 3, 19, 17), PLANE),
    "densenet": Outside(Dense, (2, 3, 10, 9, 8), SPACE),
    "convnext": Outside(ConvNeXt, (2, 3, 36, 32), PLANE),
    "aspp": Outside(Pyramid, (2, 3, 33, 32), PLANE),
    "squeeze_excite": Outside(Excite, (2, 3, 9, 8, 7), SPACE),
    "monai_unet": Outside(_monai("UNet", 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2), (2, 1, 16, 16, 16), SPACE),
    "monai_segresnet": Outside(
        _monai("SegResNet", spatial_dims=3, init_filters=8, in_channels=1, blocks_down=(1, 2), blocks_up=(1,)),
        (2, 1, 16, 16, 16),
        SPACE,
    ),
    "monai_vnet": Outside(_monai("VNet", 3, 1, 2), (1, 1, 32, 16, 16), ("d2",), steps=1),  # 45 million parameters
    "monai_dynunet": Outside(
        _monai("DynUNet", 3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 16), res_block=True),
        (2, 1, 16, 16, 16),
        SPACE,
    ),
    "monai_attention_unet": Outside(_monai("AttentionUnet", 3, 1, 2, (4, 8, 16), (2, 2)), (2, 1, 16, 16, 16), SPACE),
    "monai_swin_unetr": Outside(
        _monai(
            "SwinUNETR", in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
        ),
        (1, 1, 64, 32, 32),
        ("d2",),
    ),
    "monai_unetr": Outside(
        _monai("UNETR", 1, 2, 32, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=4), (1, 1, 32, 32, 32), ("d2",)
    ),
}
