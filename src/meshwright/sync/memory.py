"""The memory of gradients: who else sees it, and in which order their elements lie there."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch

_version, _grad = (torch._C.TensorBase.__dict__[name].__get__ for name in ("_version", "grad"))


class Held(NamedTuple):
    """A gradient as it was when its part was sent."""

    parameter: Any
    grad: Any
    part: torch.Tensor
    writes: int  # to the gradient
    is_alone: bool


def held(found: list[tuple[Any, Any]]) -> list[Held]:
    """Parameters and their gradients as they are now."""
    alone = [is_alone(grad) for _, grad in found]
    with torch._C.DisableTorchFunctionSubclass():
        return [
            Held(p, grad, grad._local_tensor, _version(grad), is_ours)
            for (p, grad), is_ours in zip(found, alone, strict=True)
        ]


def changes(sent: list[Held]) -> dict[int, tuple[int, ...]]:
    """The parameters (by number, with their shapes) whose gradients somebody has changed since."""
    found = {}
    with torch._C.DisableTorchFunctionSubclass():
        for p, grad, part, writes, _ in sent:
            if _grad(p) is not grad or grad._local_tensor is not part or _version(grad) != writes:
                found[id(p)] = tuple(p._spec.shape)
    return found


def in_order(p: Any, grad: torch.Tensor) -> torch.Tensor:
    """`grad` dense in the memory order of its parameter."""
    if grad.ndim == 1:
        return grad.contiguous()
    local = p._local_tensor
    order = local.stride() if local.shape == grad.shape and is_dense(local) else None
    if order is None or grad.stride() == order:
        return grad.contiguous() if order is None else grad
    return torch.empty_strided(grad.shape, order, dtype=grad.dtype, device=grad.device).copy_(grad)


def line_of(t: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor."""
    return t if t.ndim == 1 else t.as_strided((t.numel(),), (1,))


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
    part, memory = _holders(grad)
    return part <= _LONE[0] and memory <= _LONE[1]


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements of `t` fill its memory without gaps or overlap."""
    return _fills(t.shape, t.stride())


@lru_cache(maxsize=4096)
def _fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda entry: entry[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
