"""Whole models, five optimiser steps: what a rank runs and what one device gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import error, plan_of, whole
from harness_driver import Key, Record, run_keys
from torch import Tensor, nn

import meshwright as mw
from meshwright.models import cosmoflow
from meshwright.models.small_unet import SmallUNet
from meshwright.models.unet3d import UNet3D

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last_3d
STEPS = 5
LIMIT = 1e-8  # fp64, a whole model
SMALLEST = 1e-3  # weights below this are compared by their absolute difference
PLANS = ("one", "d2", "h2", "d2h2", "n2d2", "d4", "d2h2w2")


def _unet3d() -> nn.Module:
    """With few channels: the same structure, small enough for eight ranks."""
    return UNet3D(base=2)


def _cosmoflow() -> nn.Module:
    """The seven convolutions on a cube of 32³, where three pools are left before 2³ positions remain."""
    return cosmoflow.CosmoFlow(32, in_channels=2, width=2, batch_norm=True, keep=1.0)


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


@dataclass(frozen=True)
class Model:
    name: str
    make: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    shape: tuple[int, ...]
    classes: int  # 0: regression to four numbers
    plans: tuple[str, ...] = PLANS


MODELS = {
    model.name: model
    for model in (
        Model("small_unet_batch", lambda: SmallUNet(base=4), _momentum, (2, 1, 13, 12, 9), 3, (*PLANS, "n2d2h2")),
        Model("small_unet_group", lambda: SmallUNet(base=4, norm="group"), _adam, (2, 1, 16, 12, 8), 3),
        Model("small_unet_plain", lambda: SmallUNet(base=4, norm="none"), _adam, (2, 1, 10, 11, 8), 3),
        Model("unet3d", _unet3d, _momentum, (2, 1, 16, 16, 16), 3),
        Model("cosmoflow", _cosmoflow, _adam, (2, 2, 32, 32, 32), 0),
    )
}


def _data(model: Model, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(model.shape, generator=generator, dtype=torch.float64)
    if model.classes:
        return x, torch.randint(0, model.classes, (model.shape[0], *model.shape[2:]), generator=generator)
    return x, torch.randn((model.shape[0], 4), generator=generator, dtype=torch.float64)


def train(
    model: Model, plan: mw.Plan | None, dtype: torch.dtype = torch.float64, fmt: torch.memory_format = CONTIGUOUS
) -> dict[str, Tensor]:
    """Weights, buffers and losses after the steps, under a plan or (None) as plain torch."""
    torch.manual_seed(7)
    module = model.make().to(dtype=dtype, memory_format=fmt)
    if plan is not None:
        mw.parallelize(module, plan, strict=True)
    optimizer = model.optimizer(module.parameters())
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, target = _data(model, step)
        x = x.to(dtype=dtype, memory_format=fmt)
        target = target if model.classes else target.to(dtype)
        if plan is not None:
            x = mw.shard(x, plan)
            target = mw.shard(target, plan, layout="NDHW" if model.classes else None)
        y = module(x)
        loss = F.cross_entropy(y, target) if model.classes else F.mse_loss(y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found[f"loss {step}"] = torch.tensor(loss.item(), dtype=torch.float64)
    return found | {name: whole(value) for name, value in module.state_dict().items()}


def save_reference(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    values = train(MODELS[name], None)
    np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in values.items()})


@dataclass(frozen=True)
class Single:
    """A model in fp32: no further from one device than 10 × the spread between two orders of summation there."""

    model: Model
    folder: Path

    def judge(self, plan: str) -> Record:
        first, second = (train(self.model, None, torch.float32, fmt) for fmt in (CONTIGUOUS, LAST))
        ours = train(self.model, plan_of(plan), torch.float32)
        spread = max(error(first[key], second[key], SMALLEST) for key in first)
        errors = {key: error(ours[key], value, SMALLEST) for key, value in first.items()}
        assert 0 < spread < 0.1, f"the spread of one device is {spread}"
        return Record(f"{self.model.name}_fp32", plan, errors, dict.fromkeys(errors, 10 * spread))


@dataclass(frozen=True)
class Exact:
    """A model judged against the stored values of one device."""

    model: Model
    folder: Path

    def judge(self, plan: str) -> Record:
        ours = train(self.model, plan_of(plan))
        with np.load(self.folder / f"{self.model.name}.npz", allow_pickle=False) as stored:
            truth = {key: torch.from_numpy(stored[key]) for key in stored.files}
        assert set(ours) == set(truth), sorted(set(ours) ^ set(truth))
        errors = {key: error(ours[key], value, SMALLEST) for key, value in truth.items()}
        return Record(self.model.name, plan, errors, dict.fromkeys(errors, LIMIT))


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""

    def lookup(name: str) -> Exact | Single:
        kind = Single if name.endswith("_fp32") else Exact
        return kind(MODELS[name.removesuffix("_fp32")], Path(folder))

    run_keys(lookup, keys, folder)


KEYS: list[Key] = [(name, plan) for name, model in MODELS.items() for plan in model.plans]
KEYS += [
    (f"{name}_fp32", plan) for name in ("small_unet_batch", "small_unet_plain", "unet3d") for plan in ("d2", "d2h2")
]
