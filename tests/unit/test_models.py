"""The published networks have the published counts; the small one takes any size; Dice means what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meshwright.models.cosmoflow import CosmoFlow, pools
from meshwright.models.losses import hard_dice, soft_dice
from meshwright.models.resnet import ResNet, resnet18, resnet50
from meshwright.models.small_unet import SmallUNet, benchmark_unet
from meshwright.models.unet3d import UNet3D


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops(model: nn.Module, *shape: int) -> dict[str, int]:
    """2 per multiply and add, by operation; on the meta device, so nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(shape, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return {str(operation).split(".")[-1]: count for operation, count in counts.items()}


def test_unet3d_has_the_published_counts() -> None:
    model = UNet3D()
    assert count_parameters(model) == 19_070_563
    assert sum(forward_flops(model, 1, 1, 256, 256, 256).values()) == pytest.approx(31.3e12, rel=2e-3)


def test_unet3d_may_be_narrower() -> None:
    few, more = count_parameters(UNet3D(base=4)), count_parameters(UNet3D(base=8))
    assert 3.9 < more / few < 4.0  # norms and the head grow linearly
    with pytest.raises(ValueError, match="base = 0"):
        UNet3D(base=0)


def test_unet3d_keeps_the_size() -> None:
    assert UNet3D().eval()(torch.zeros(1, 1, 16, 8, 24)).shape == (1, 3, 16, 8, 24)


@pytest.mark.parametrize(("size", "gflop"), [(128, 55.55), (256, 443.8), (512, 3550)])
def test_cosmoflow_has_the_published_counts(size: int, gflop: float) -> None:
    with torch.device("meta"):
        model = CosmoFlow(size)
    assert count_parameters(model) == 9_437_636
    flops = forward_flops(model, 1, 4, size, size, size)
    assert 3 * flops["convolution"] / 1e9 == pytest.approx(gflop, rel=2e-4)
    assert 3 * sum(flops.values()) / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_cosmoflow_runs_with_batch_norm_and_a_smaller_width() -> None:
    model = CosmoFlow(128, in_channels=1, width=2, batch_norm=True, outputs=3).eval()
    assert model(torch.zeros(2, 1, 128, 128, 128)).shape == (2, 3)
    assert sum(isinstance(module, nn.BatchNorm3d) for module in model.modules()) == 7


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_cosmoflow_leaves_out_pools_until_2_cubed_positions_remain(size: int) -> None:
    model = CosmoFlow(size, in_channels=1, width=1, outputs=3).eval()
    assert model.features(torch.zeros(1, 1, size, size, size)).shape == (1, 16, 2, 2, 2)
    assert sum(isinstance(module, nn.AvgPool3d) for module in model.modules()) == pools(size)
    assert (pools(128), pools(256), pools(512)) == (5, 6, 7)  # as published


@pytest.mark.parametrize("size", [8, 24, 100, 1024])
def test_cosmoflow_refuses_a_size_that_does_not_halve_to_2(size: int) -> None:
    with pytest.raises(ValueError, match=rf"16, 32, 64, 128, 256, 512 voxels a side, not {size}"):
        CosmoFlow(size)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 10, 11), (7, 9, 5), (13, 6, 15)])
def test_small_unet_takes_any_size_and_reaches_every_parameter(norm: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = SmallUNet(in_channels=2, classes=4, base=4, norm=norm)  # type: ignore[arg-type]
    out = model(torch.randn(1, 2, *size))
    assert out.shape == (1, 4, *size)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_small_unet_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="choose 'batch', 'group' or 'none'"):
        SmallUNet(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one level"):
        SmallUNet(levels=0)


def test_benchmark_unet_is_the_one_of_the_definition() -> None:
    model = benchmark_unet()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        *[(4, 16, 3), (16, 16, 3), (16, 32, 3), (32, 32, 3), (32, 64, 3), (64, 64, 3)],
        *[(64, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 3), (16, 3, 1)],
    ]
    assert all(c.bias is not None for c in convolutions)
    rises = [module for module in model.modules() if isinstance(module, nn.ConvTranspose3d)]
    assert [(t.in_channels, t.out_channels, t.kernel_size, t.stride) for t in rises] == [
        (64, 32, (2, 2, 2), (2, 2, 2)),
        (32, 16, (2, 2, 2), (2, 2, 2)),
    ]
    assert not any(isinstance(module, nn.BatchNorm3d | nn.GroupNorm) for module in model.modules())


def sets_dice(prediction: torch.Tensor, target: torch.Tensor, label: int) -> float:
    a = {tuple(position) for position in (prediction == label).nonzero().tolist()}
    b = {tuple(position) for position in (target == label).nonzero().tolist()}
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def test_hard_dice_is_the_overlap_of_sets() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 5, 3, 4, 5)
    logits[:, 4] = -100  # class 4 is never predicted, nor present
    target = torch.randint(0, 4, (2, 3, 4, 5), dtype=torch.uint8)
    expected = [sets_dice(logits.argmax(1), target, label) for label in range(5)]
    assert hard_dice(logits, target).tolist() == pytest.approx(expected)


def test_soft_dice_of_certain_logits_is_hard_dice_and_its_gradient_is_right() -> None:
    torch.manual_seed(2)
    target = torch.randint(0, 3, (1, 3, 4, 5), dtype=torch.uint8)
    logits = torch.randn(1, 3, 3, 4, 5)
    certain = 1e4 * logits
    assert soft_dice(certain, target).item() == pytest.approx(1 - hard_dice(logits, target).mean().item(), abs=1e-5)
    assert soft_dice(logits.bfloat16(), target).dtype == torch.float32
    assert soft_dice(logits.double(), target).dtype == torch.float64
    logits.requires_grad_()
    soft_dice(logits, target).backward()
    step = 1e-2
    moved = logits.detach() - step * logits.grad / logits.grad.norm()
    expected = soft_dice(logits.detach(), target).item() - step * logits.grad.norm().item()
    assert soft_dice(moved, target).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("make", "count"), [(resnet18, 11_689_512), (resnet50, 25_557_032)])
def test_resnets_have_the_published_counts(make: Callable[..., ResNet], count: int) -> None:
    """Those of the ImageNet networks everybody uses; the volumetric form answers too."""
    assert sum(p.numel() for p in make().parameters()) == count
    assert make(3, classes=4, base=4)(torch.zeros(2, 3, 33, 32, 17)).shape == (2, 4)
