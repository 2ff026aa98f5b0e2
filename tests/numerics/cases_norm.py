"""Normalisation: statistics over the whole sample or batch, and equal running statistics on every rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import Case, Input
from harness_bounds import Bound
from torch import nn

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
# mean, spread and count, twice over: O(channels) for a batch norm, O(samples · channels) where samples stand alone
PER_CHANNEL = Bound(statistics=lambda shapes: 4 * shapes[0][1] + 4)
PER_SAMPLE = Bound(statistics=lambda shapes: 4 * shapes[0][0] * shapes[0][1] + 4)


def used(module: nn.Module) -> nn.Module:
    """A norm with weights and running statistics that are not their starting values."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + 0.5 if "var" in name or "weight" in name else torch.randn_like(value)
                )
    return module


def batch(name: str, ndim: int, *, shape: tuple[int, ...] = (), case: dict[str, Any] | None = None, **o: Any) -> Case:
    size = shape or SIZES[ndim]
    bound = Bound() if case and case.get("training") is False else PER_CHANNEL
    make = lambda: used(BATCH[ndim](size[1], **o))  # noqa: E731
    return Case(f"batch_norm{ndim}d_{name}", make, (Input(size),), bound, **(case or {}))


def instance(name: str, ndim: int, **o: Any) -> Case:
    size = SIZES[ndim]
    make = lambda: used(INSTANCE[ndim](size[1], **o))  # noqa: E731
    return Case(f"instance_norm{ndim}d_{name}", make, (Input(size),), PER_SAMPLE, steps=2)


def group(name: str, shape: tuple[int, ...], groups: int, **o: Any) -> Case:
    inputs = (Input(shape),)
    return Case(
        f"group_norm_{name}", lambda: used(nn.GroupNorm(groups, shape[1], **o)), inputs, PER_SAMPLE, sample=True
    )


class Sync(nn.Module):
    """torch's own forward refuses CPUs in a distributed job, so the reference is the batch norm of the same module."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.norm = used(nn.SyncBatchNorm(channels, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if hasattr(x, "full_tensor") else nn.BatchNorm1d.forward(self.norm, x)


def sync(name: str, ndim: int, *, shape: tuple[int, ...] = (), case: dict[str, Any] | None = None, **o: Any) -> Case:
    size = shape or SIZES[ndim]
    bound = Bound() if case and case.get("training") is False else PER_CHANNEL
    return Case(f"sync_batch_norm{ndim}d_{name}", lambda: Sync(size[1], **o), (Input(size),), bound, **(case or {}))


def trailing(kind: type[nn.Module], ndim: int, count: int, name: str = "", **o: Any) -> Case:
    """A norm over the last `count` dims, split or not: two sums for each of the other positions."""
    size = SIZES[ndim]
    rest = math.prod(size[: len(size) - count])
    make = lambda: used(kind(size[len(size) - count :], **o))  # noqa: E731
    word = "layer_norm" if kind is nn.LayerNorm else "rms_norm"
    bound = Bound(statistics=lambda shapes: 4 * rest + 4)
    return Case(f"{word}{ndim}d_last_{count}{name}", make, (Input(size),), bound)


def offset(name: str, make: Any, mean: float) -> Case:
    """fp32 inputs far from zero: no worse than a few times plain torch."""
    word = f"{name}_fp32_offset_{mean:g}"
    inputs = (Input(SIZES[2], offset=mean),)
    return Case(word, make, inputs, PER_SAMPLE, dtype=torch.float32, against_plain=3.0)


class ChannelsLastNorm(nn.Module):
    """Layer norm over channels, as ConvNeXt writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = used(nn.LayerNorm(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


CASES = [
    batch("train", 1, case={"steps": 3}),
    batch("train", 2, case={"steps": 3}),
    batch("train", 3, case={"steps": 3, "sample": True}),
    batch("eval", 3, case={"training": False}),
    batch("plain", 3, affine=False),
    batch("untracked", 3, track_running_stats=False),
    batch("untracked_eval", 2, track_running_stats=False, case={"grad": False}),
    batch("cumulative", 2, momentum=None, case={"steps": 3}),
    batch("momentum", 2, momentum=0.3, eps=1e-2, case={"steps": 2}),
    batch("no_grad", 3, case={"grad": False}),
    batch("size5_empty_shards", 3, shape=(2, 4, 5, 5, 5), case={"steps": 2, "sample": True}),
    batch("features", 1, shape=(6, 5), case={"plans": ("n4",)}),
    batch("fp32", 3, case={"dtype": torch.float32, "against_plain": 3.0}),
    Case(
        "batch_norm3d_fp32_offset_1e4",
        lambda: used(nn.BatchNorm3d(4)),
        (Input(SIZES[3], offset=1e4),),
        PER_CHANNEL,
        dtype=torch.float32,
        against_plain=3.0,
    ),
    sync("train", 1, case={"steps": 3}),
    sync("train", 2, case={"steps": 3}),
    sync("train", 3, case={"steps": 3, "sample": True}),
    sync("eval", 3, case={"training": False}),
    sync("cumulative", 2, momentum=None, case={"steps": 3}),
    sync("plain", 3, affine=False),
    sync("untracked", 2, track_running_stats=False),
    sync("features", 1, shape=(6, 5), case={"plans": ("n4",)}),
    batch("cumulative_plain", 1, momentum=None, affine=False, case={"steps": 3}),
    batch("cumulative_eval", 3, momentum=None, case={"training": False}),
    group("1d", (3, 4, 21), 2),
    group("2d", (2, 6, 11, 13), 3),
    group("3d", (3, 4, 9, 10, 7), 2),
    group("one_group", (2, 4, 9, 10, 7), 1),
    group("plain", (2, 4, 5, 5, 5), 4, affine=False),
    instance("plain", 1),
    instance("affine", 2, affine=True),
    instance("affine", 3, affine=True),
    instance("tracked", 3, affine=True, track_running_stats=True),
    Case("layer_norm_channels_last", lambda: ChannelsLastNorm(6), (Input((2, 6, 9, 10, 7)),), Bound(), sample=True),
    Case(
        "layer_norm_over_space",
        lambda: used(nn.LayerNorm((9, 10, 7))),
        (Input((3, 4, 9, 10, 7)),),
        PER_SAMPLE,
    ),
    Case(
        "layer_norm_over_width",
        lambda: used(nn.LayerNorm(13)),
        (Input((2, 4, 11, 13)),),
        Bound(statistics=lambda shapes: 4 * 2 * 4 * 11),
    ),
    Case(
        "layer_norm_plain",
        lambda: nn.LayerNorm((4, 11, 13), elementwise_affine=False),
        (Input((2, 4, 11, 13)),),
        PER_SAMPLE,
    ),
    instance("plain", 2),
    instance("tracked_plain", 1, track_running_stats=True),
    instance("tracked", 2, affine=True, track_running_stats=True, momentum=0.3),
    Case(
        "instance_norm3d_tracked_eval",
        lambda: used(nn.InstanceNorm3d(4, affine=True, track_running_stats=True)),
        (Input(SIZES[3]),),
        Bound(),
        training=False,
    ),
    *(trailing(nn.LayerNorm, ndim, count) for ndim in (1, 2, 3) for count in range(1, ndim + 2)),
    *(trailing(nn.RMSNorm, ndim, count) for ndim in (1, 2, 3) for count in range(1, ndim + 2)),
    trailing(nn.LayerNorm, 3, 2, "_nobias", bias=False),
    trailing(nn.LayerNorm, 3, 4, "_plain", elementwise_affine=False),
    trailing(nn.RMSNorm, 3, 3, "_plain", elementwise_affine=False, eps=1e-3),
    *(
        Case(f"local_response_norm{n}d", lambda: nn.LocalResponseNorm(3, 1e-2, 0.7, 1.5), (Input(SIZES[n]),), Bound())
        for n in (1, 2, 3)
    ),
    offset("group_norm", lambda: nn.GroupNorm(2, 4), 1e4),
    offset("instance_norm", lambda: nn.InstanceNorm2d(4), 1e4),
    offset("layer_norm_space", lambda: nn.LayerNorm((11, 13)), 1e4),
    offset("layer_norm_all", lambda: nn.LayerNorm((4, 11, 13)), 1e4),
    offset("rms_norm", lambda: nn.RMSNorm((11, 13)), 1e4),
]
