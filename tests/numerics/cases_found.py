"""What the random programs once found wrong, each as a case of its own."""

from __future__ import annotations

import torch
from harness import Call, Case, Input
from torch import Tensor, nn


def _products(x: Tensor) -> Tensor:
    """Products over split space are summands; a whole function follows."""
    rows = x.flatten(2)
    return torch.log_softmax(rows @ rows.transpose(1, 2), -1)


def _centred(x: Tensor) -> Tensor:
    """A sum over split space less the mean of its single entry: exactly nothing on one device."""
    rows = x.flatten(2)
    product = rows @ rows.transpose(1, 2)
    mean = product.mean(1, True)
    return (product - mean) + (product + -mean)


class Correlated(nn.Module):
    """A gradient that is split and not yet summed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv3d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.einsum("ncdhw,nkdhw->nck", y, y.clone().mul_(2))


def _shifted(groups: int, channels: int) -> nn.Module:
    """With a bias, which is all that a group of a single position leaves."""
    norm = nn.GroupNorm(groups, channels)
    nn.init.constant_(norm.bias, 0.7)
    return norm


CASES = [
    Case("found_function_of_summands", lambda: Call(_products), (Input((2, 3, 5, 4, 4)),), sample=True, strict=False),
    Case("found_difference_of_a_sum", lambda: Call(_centred), (Input((1, 1, 5, 7, 3)),), strict=False),
    Case("found_split_unsummed_gradient", Correlated, (Input((2, 2, 5, 6, 3)),), sample=True, strict=False),
    Case("found_norm_of_one_position", lambda: nn.GroupNorm(1, 4), (Input((1, 4, 1, 1, 1)),), strict=False),
    Case("found_group_norm_small_parts", lambda: _shifted(2, 2), (Input((4, 2, 1, 1, 1)),), strict=False),
    Case("found_roll_by_nothing", lambda: Call(lambda x: torch.roll(x, 0, 2) * 2), (Input((2, 2, 5, 4, 4)),)),
    Case("found_single_element", lambda: Call(lambda x: x[:, :, ::3].sum((1, 2)) * 2), (Input((1, 1, 2, 2, 1)),)),
]
