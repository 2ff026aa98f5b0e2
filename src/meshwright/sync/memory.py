"""The memory of gradients: who else sees it, and in which order their elements lie there."""

from __future__ import annotations

import sys
from typing import Any

import torch


def in_order(p: Any, grad: torch.Tensor) -> torch.Tensor:
    """`grad` dense in the memory order of its parameter."""
    local = p._local_tensor
    order = local.stride() if local.shape == grad.shape and is_dense(local) else None
    if order is None or grad.stride() == order:
        return grad.contiguous() if order is None else grad
    return torch.empty_strided(grad.shape, order, dtype=grad.dtype, device=grad.device).copy_(grad)


def line_of(t: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor."""
    return t.as_strided((t.numel(),), (1,))


def shaped(line: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The memory of `line` in the shape and strides of `like`, as no view."""
    return line.new_empty(0).set_(line.untyped_storage(), line.storage_offset(), like.shape, like.stride())


def _holders(grad: Any) -> tuple[int, int]:
    """How many hold the part of `grad`, and how many its memory; with those that count here."""
    local = grad._local_tensor
    return sys.getrefcount(local), torch._C._storage_Use_Count(local.untyped_storage()._cdata)


class _Lone:
    """Holds a tensor as a gradient does its part, and nobody else holds it."""

    def __init__(self) -> None:
        self._local_tensor = torch.empty(1)


_LONE = _holders(_Lone())  # versions of Python count differently


def is_alone(grad: Any) -> bool:
    """Whether nobody but `grad` sees the memory of its part: no other mesh tensor, and no view."""
    return all(count <= lone for count, lone in zip(_holders(grad), _LONE, strict=True))


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements of `t` fill its memory without gaps or overlap."""
    expected = 1
    for size, stride in sorted(zip(t.shape, t.stride(), strict=True), key=lambda entry: entry[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
