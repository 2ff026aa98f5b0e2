"""What the scenarios share: a small U-shaped network, a loss, and comparisons by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import error, plan_of, whole
from harness_driver import Record
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw

Errors = dict[str, float]
SHAPE = (2, 3, 9, 10, 8)
LIMIT = 1e-10


@dataclass(frozen=True)
class Scenario:
    """`run` returns the errors; `limit` is the largest allowed."""

    name: str
    run: Callable[[mw.Plan], Errors]
    plans: tuple[str, ...] = ("d4", "d2h2")
    limit: float = LIMIT

    def all_plans(self) -> tuple[str, ...]:
        return ("one", *self.plans)

    def judge(self, plan: str) -> Record:
        errors = self.run(plan_of(plan))
        return Record(self.name, plan, errors, dict.fromkeys(errors, self.limit))


class Net(nn.Module):
    """Convolution, batch norm, pooling, a transposed convolution and a skip: a small U."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(4, 6, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.last = nn.Conv3d(8, 2, 1)
        self.recompute: bool | None = None  # None: keep activations; else `use_reentrant`

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        again = self.recompute
        deep = self.down(skip) if again is None else checkpoint(self.down, skip, use_reentrant=again)
        up = self.up(deep)
        up = F.pad(
            up, [v for s, u in zip(reversed(skip.shape[2:]), reversed(up.shape[2:]), strict=True) for v in (0, s - u)]
        )
        return self.last(torch.cat([skip, up], 1))


def net(seed: int = 1, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def sample(seed: int = 2, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def objective(y: Tensor) -> Tensor:
    """A loss that weighs every element differently."""
    weight = torch.randn(tuple(y.shape), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (y * weight.to(y.dtype)).sum() + (y * y).mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"grad {name}": whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in module.state_dict().items()}


def against(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    assert set(ours) == set(truth), f"names differ: {sorted(set(ours) ^ set(truth))}"
    floor = 1e-3 * max(float(value.abs().max()) for value in truth.values())
    return {name: error(ours[name], value, floor) for name, value in truth.items()}


def trained(module: nn.Module, x: Tensor, steps: int = 1, optimizer: Any = None) -> dict[str, Tensor]:
    """Gradients after `steps` of forward and backward; with an optimiser also the state."""
    for _ in range(steps):
        if optimizer is not None:
            optimizer.zero_grad()
        objective(module(x)).backward()
        if optimizer is not None:
            optimizer.step()
    return gradients(module) | (state(module) if optimizer is not None else {})


def pair(plan: mw.Plan, strict: bool = True) -> tuple[nn.Module, Net, Tensor]:
    """A parallel module, the same as plain torch, and an input."""
    plain = net()
    return mw.parallelize(copy.deepcopy(plain), plan, strict=strict), plain, sample()
