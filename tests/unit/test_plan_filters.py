"""Which convolutions are split by filters: arithmetic of shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.errors import UnsupportedError
from meshwright.models.resnet import resnet18
from meshwright.plan.exchange import planned
from meshwright.plan.filters import filters_axis
from meshwright.plan.layers import layers_of

HEIGHT = [(0, 2, 2)]  # axis 0 splits dim 2 over two ranks


def _of_resnet(images: int) -> list[str]:
    """The convolutions of ResNet-18 on images of 512² that are split by filters where the input is split in height."""
    with torch.device("meta"):
        model = resnet18()
    found: list[str] = []

    def note(name: str, conv: nn.Conv2d, x: torch.Tensor) -> None:
        if filters_axis(x.shape, conv.weight.shape, conv.groups, HEIGHT) is not None:
            found.append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda conv, args, name=name: note(name, conv, args[0]))
    model(torch.empty(images, 3, 512, 512, device="meta"))
    return found


def test_the_last_levels_of_a_network() -> None:
    assert _of_resnet(1) == [
        *(f"levels.{name}.0" for name in ("4.body.1", "5.body.0", "5.body.1", "6.body.0", "6.body.1")),
        *(f"levels.7.body.{index}.0" for index in range(2)),
    ]
    assert _of_resnet(8) == [f"levels.{name}.0" for name in ("6.body.1", "7.body.0", "7.body.1")]
    assert _of_resnet(16) == _of_resnet(8)
    assert not _of_resnet(32)


@pytest.mark.parametrize(
    ("shape", "weight", "groups", "split"),
    [
        ((1, 64, 8, 8), (512, 64, 3, 3), 1, HEIGHT),  # few weights
        ((1, 512, 8, 8, 8), (512, 512, 3, 3, 3), 1, HEIGHT),  # a volume
        ((1, 512, 8, 8), (512, 256, 3, 3), 2, HEIGHT),
        ((1, 512, 8, 8), (512, 512, 3, 3), 1, [(0, 2, 2), (1, 3, 2)]),  # two axes in space
        ((1, 512, 8, 8), (512, 512, 3, 3), 1, [(0, 0, 2)]),  # samples alone
        ((0, 512, 8, 8), (512, 512, 3, 3), 1, HEIGHT),
        ((1, 200000, 1, 1), (5, 200000, 1, 1), 1, [(0, 2, 4)]),  # two filters each leave the last rank nothing
    ],
)
def test_what_stays_in_space(
    shape: tuple[int, ...], weight: tuple[int, ...], groups: int, split: list[tuple[int, int, int]]
) -> None:
    assert filters_axis(shape, weight, groups, split) is None


def test_samples_may_be_split_as_well() -> None:
    assert filters_axis((4, 512, 8, 8), (512, 512, 3, 3), 1, [(0, 0, 2), (1, 3, 2)]) == 1


def test_where_the_input_is_split_already() -> None:
    shortcut = (1, 256, 32, 32), (512, 256, 1, 1), 1
    assert filters_axis(*shortcut, HEIGHT) is None
    assert filters_axis(*shortcut, [(0, 1, 2)]) == 0


def test_its_exchange_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1))
    network = layers_of(model, torch.empty(1, 512, 8, 8))
    with pytest.raises(UnsupportedError, match=r"'0'.*split by filters"):
        planned(network, mw.Plan.uniform(height=2))
    assert planned(network, mw.Plan.uniform(height=2, width=2))
