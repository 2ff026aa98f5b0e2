"""Halves that meet: what the machine charges two processes for coming together as often as a split network must.

Where Meshwright exchanges windows or moments, these independent halves exchange eight numbers by the same transport:
around convolutions and pooling behind the work, at norms before it goes on. They compute nothing else than the halves
that never meet. What they take longer is waiting for the other process, which any way to split the network has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from meshwright.parallel.functions import tuple_of
from meshwright.parallel.transport import Transfer, channels

_WINDOWS = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d)


class _Meetings:
    """Posts eight numbers, and waits for the other's."""

    def __init__(self) -> None:
        self._group = dist.new_group()
        self._peer, self._mine, self._theirs = 1 - dist.get_rank(), torch.ones(8), torch.empty(8)
        channels(self._group)
        self._open: list[Transfer] = []

    def post(self, *_: Any) -> None:
        self._open.append(Transfer(self._group, [(self._peer, self._mine)], [(self._peer, self._theirs)]))

    def wait(self, *_: Any) -> None:
        self._open.pop(0).wait()


def meeting(model: nn.Module) -> nn.Module:
    """`model`, which meets the other rank's, forward and backward; collective."""
    meet = _Meetings()

    def behind(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        meet.wait()
        if given[0].requires_grad:
            out.register_hook(meet.post)
            given[0].register_hook(meet.wait)

    def before(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        def both(*_: Any) -> None:
            meet.post()
            meet.wait()

        both()
        out.register_hook(both)

    for module in model.modules():
        if isinstance(module, _WINDOWS):
            kernel, stride = tuple_of(module.kernel_size, 3)[0], tuple_of(module.stride, 3)[0]
            if kernel > (1 if isinstance(module, nn.Conv2d | nn.Conv3d) else stride):
                module.register_forward_pre_hook(meet.post)
                module.register_forward_hook(behind)
        elif isinstance(module, _NormBase | nn.GroupNorm):
            module.register_forward_hook(before)
    return model
