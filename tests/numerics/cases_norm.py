"""Normalisation: statistics over the whole sample or batch, and equal running statistics on every rank."""

from __future__ import annotations

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
]
