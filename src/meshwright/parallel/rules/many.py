"""Operators on lists (foreach and fused optimiser steps) and factories that take their layout from a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import layer
from meshwright.parallel.layout import REPLICATE, local_shape, partial_axes, replicated, splits
from meshwright.parallel.operators import cause_of, mutable, operator, placed
from meshwright.parallel.tensor import is_mesh, mesh_tensors, wrap

aten = torch.ops.aten


def _overloads(prefix: str) -> list[Any]:
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"aten::{prefix}"):
            base, _, overload = name.removeprefix("aten::").partition(".")
            packet = getattr(aten, base, None)
            if packet is not None and hasattr(packet, overload or "default"):
                found.append(getattr(packet, overload or "default"))
    return found


@operator(*_overloads("_foreach_"), *_overloads("_fused_"), *_overloads("_amp_foreach_"), linear=True)
def many(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise work on lists of replicated tensors (parameters, gradients, optimiser state)."""
    tensors = mesh_tensors([*args, *kwargs.values()])
    if any(splits(tuple(t._spec.placements)) for t in tensors):
        raise UnsupportedError(f"{func} in layer {layer()!r}: split tensors in a list; work on them one by one")
    mesh, cause = tensors[0]._spec.mesh, cause_of(func, args)

    def whole(value: Any) -> Any:
        if is_mesh(value):
            if partial_axes(tuple(value._spec.placements)) and mutable(func):
                value._local_tensor = placed(value, replicated(mesh), cause)
                value._spec = wrap(value._local_tensor, mesh, replicated(mesh))._spec
            return placed(value, replicated(mesh), cause)
        return [whole(item) for item in value] if isinstance(value, list | tuple) else value

    out = func(*(whole(a) for a in args), **{key: whole(value) for key, value in kwargs.items()})
    ledger = next((t._ledger for t in tensors if t._ledger is not None), None)

    def rewrap(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return wrap(value, mesh, replicated(mesh), None, ledger)
        return [rewrap(item) for item in value] if isinstance(value, list | tuple) else value

    return None if mutable(func) else rewrap(out)


@operator(
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_empty_strided.default,
    linear=True,
)
def new(func: Any, args: Any, kwargs: Any) -> Any:
    """A factory: split like its model where the split dims have the same sizes, else whole on every rank."""
    x, size = args[0], tuple(args[1])
    mesh, placements = x._spec.mesh, tuple(x._spec.placements)
    if func in (aten.new_ones.default, aten.new_full.default):  # as summands these would be counted once per rank
        placements = tuple(REPLICATE if isinstance(p, Partial) else p for p in placements)
    shape = tuple(x._spec.shape)
    if len(size) != len(shape) or any(size[dim] != shape[dim] for _, dim in splits(placements)):
        return wrap(func(x._local_tensor, *args[1:], **kwargs), mesh, replicated(mesh), None, x._ledger)
    local = list(local_shape(mesh, placements, size))
    if func is aten.new_empty_strided.default and size == shape:
        out = torch.empty_like(x._local_tensor, **kwargs)
    elif func is aten.new_empty_strided.default:
        out = torch.empty(local, dtype=x.dtype, device=x.device).to(**kwargs)
    else:
        out = func(x._local_tensor, local, *args[2:], **kwargs)
    return wrap(out, mesh, placements, size, x._ledger)


@operator(aten.is_same_size.default)
def is_same_size(func: Any, args: Any, kwargs: Any) -> bool:
    """Compared by global shapes."""
    return bool(args[0].shape == args[1].shape)
