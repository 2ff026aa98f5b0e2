"""Concatenation of channels in half precision on CPUs, whose gradients are dense.

torch hands out the gradient of a concatenation as views. Where channels lie together in memory (channels_last) such
a view has runs of a few numbers, which its kernels add up one run at a time: that of a skip connection of 16 channels
at 96 cubed takes 40 ms to be added to another, copied first 23 (bf16; docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.parallel.functions import function
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import axis_of
from meshwright.parallel.node import Node
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.tensor import is_mesh


class _Join(Node):
    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.channels = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        found = zip(grad.split(ctx.channels, 1), ctx.needs_input_grad, strict=True)
        return tuple(g.contiguous(memory_format=memory_format(grad)) if needed else None for g, needed in found)


@function(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """On the parts where rules made all operands; else by the rule of the operator."""
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else 0))
    if not isinstance(tensors, Sequence) or not tensors or len(args) + len(kwargs) > 1 or not torch.is_grad_enabled():
        return NotImplemented
    if not all(is_mesh(t) and _is_slow(t._local_tensor) for t in tensors) or dim not in (1, 1 - tensors[0].ndim):
        return NotImplemented
    first = tensors[0]
    mesh, placements, shape = first._spec.mesh, tuple(first._spec.placements), tuple(first._spec.shape)
    for t in tensors:
        its = tuple(t._spec.shape)
        alike = t._spec.mesh is mesh and tuple(t._spec.placements) == placements and t.dtype is first.dtype
        if not alike or (its[0], *its[2:]) != (shape[0], *shape[2:]) or axis_of(placements, 1) is not None:
            return NotImplemented
    parts = [to_local(t) for t in tensors]
    out_shape = (shape[0], sum(t.shape[1] for t in tensors), *shape[2:])
    return from_local(_Join.apply(*parts), mesh, placements, out_shape, first._ledger)


def _is_slow(part: torch.Tensor) -> bool:
    halves = part.device.type == "cpu" and part.dtype in (torch.bfloat16, torch.float16)
    return halves and memory_format(part) is not torch.contiguous_format
