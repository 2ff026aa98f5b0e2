"""`nn.SyncBatchNorm` in a parallelized module: batch norm, whose statistics are those of the whole batch here anyway.

torch's forward asks for an accelerator and exchanges statistics of plain local tensors by itself, so it must not run
on mesh tensors. The module, its parameters, buffers and their names stay.
"""

from __future__ import annotations

from types import MethodType

from torch import nn


def adopt(module: nn.Module) -> None:
    """Give a `SyncBatchNorm` the forward of the plain batch norm (its own checks of the input's shape stay)."""
    if isinstance(module, nn.SyncBatchNorm) and type(module).forward is nn.SyncBatchNorm.forward:
        module.forward = MethodType(nn.BatchNorm1d.forward, module)  # type: ignore[method-assign]
