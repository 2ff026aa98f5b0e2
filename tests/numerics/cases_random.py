"""Randomness: one rank under `parallelize` is the reference, and every plan draws the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, conv
from torch import Tensor, nn

X3 = Input((3, 4, 9, 10, 7))
X2 = Input((2, 4, 11, 13))
NOTHING = Bound()


class Block(nn.Module):
    """Two dropouts in one forward draw different masks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.first = nn.Dropout3d(0.4)
        self.second = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.conv(self.first(x)))) + self.second(x)


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x) * torch.rand_like(x)


def factories(x: Tensor) -> Tensor:
    """Noise of a shape that is read from the input: plain factories inside a module."""
    return x * torch.rand(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1) + torch.randn(x.shape, dtype=x.dtype)


def bernoulli(x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x, 0.4))


def in_place_draws(x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_(0.5, 2.0) + torch.empty_like(x).uniform_(-1, 1)


def one(
    name: str, make: Callable[[], nn.Module], *inputs: Input, bound: Bound | None = NOTHING, **options: Any
) -> Case:
    return Case(name, make, inputs, bound, reference="one", steps=2, **options)


CASES = [
    one("dropout", lambda: nn.Dropout(0.5), X3, sample=True),
    one("dropout_2d_data", lambda: nn.Dropout(0.2), X2),
    one("dropout_features", lambda: nn.Dropout(0.5), Input((6, 5)), plans=("n4",)),
    one("dropout_channels_2d", lambda: nn.Dropout2d(0.5), X2),
    one("dropout_channels_3d", lambda: nn.Dropout3d(0.5), X3, sample=True),
    one("dropout_alpha", lambda: nn.AlphaDropout(0.3), X3),
    one("dropout_functional", lambda: Call(lambda x: F.dropout(x, 0.3) + F.dropout(x, 0.3)), X2),
    one("dropout_block", Block, X3, bound=Bound((conv(3, 3, 1, 1),))),
    one("noise_like", lambda: Call(noisy), X3, sample=True),
    one("noise_factories", lambda: Call(factories), X2),
    one("noise_bernoulli", lambda: Call(bernoulli), X2),
    one("noise_in_place", lambda: Call(in_place_draws), X3),
    Case("dropout_eval", lambda: nn.Dropout(0.5), (X3,), NOTHING, training=False),
]
