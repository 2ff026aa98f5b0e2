"""Elementwise operators, in-place ones included: every rank works on its own part, nothing is sent.

Operands broadcast as in torch, by *global* shapes. A plain tensor, or a replicated one, that meets a split one is
cut to the part this rank owns (a mask built from `x.shape`, a weight vector, a target).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from meshwright.errors import UnsupportedError
from meshwright.parallel.comm import Cause
from meshwright.parallel.layout import REPLICATE, Placements, owned, partial_axes, replicated, splits
from meshwright.parallel.operators import (
    LINEAR,
    POINTWISE,
    cause_of,
    fallback,
    mutable,
    operator,
    placed,
    set_pointwise,
    summed,
)
from meshwright.parallel.tensor import is_mesh, like, wrap

aten = torch.ops.aten
POINTWISE |= {
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        "masked_fill_": "Scalar Tensor",
        "fill_": "Scalar Tensor",
        "zero_": "default",
        "copy_": "default",
        "elu_backward": "default",
        "hardtanh_backward": "default",
        "hardswish": "default",
        "hardswish_": "default",
        "hardswish_backward": "default",
        "hardsigmoid_backward": "default",
        "softplus_backward": "default",
        "mish_backward": "default",
        "leaky_relu_backward": "default",
        "hardshrink_backward": "default",
        "softshrink": "default",
        "softshrink_backward": "default",
        "_to_copy": "default",
        "clone": "default",
        "zeros_like": "default",
        "ones_like": "default",
        "full_like": "default",
        "empty_like": "default",
        "bitwise_and_": "Tensor Scalar",
        "nan_to_num": "default",
        "isclose": "default",
        "log_sigmoid_forward": "default",
        "log_sigmoid_backward": "default",
        "_prelu_kernel": "default",
        "_prelu_kernel_backward": "default",
        "leaky_relu": "default",  # from here on: tagged by torch 2.13, not yet by 2.11
        "leaky_relu_": "default",
        "celu_": "default",
        "elu_": "default",
        "selu_": "default",
        "hardtanh_": "default",
        "hardsigmoid_": "default",
    }.items()
    for overload in overloads.split()
    if hasattr(getattr(aten, name, None), overload)
}
# what torch asks for shapes where one operand is its tensor of zeros without memory
POINTWISE |= {torch.ops.prims.add.default, torch.ops.prims.sub.default, torch.ops.prims.mul.default}
POINTWISE |= {torch.ops.prims.div.default}
LINEAR |= {aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.clone.default, aten._to_copy.default}
_BINARY_LINEAR = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.add_.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.copy_.default,
}
LINEAR |= _BINARY_LINEAR


def aligned(placements: Placements, shape: tuple[int, ...], result: tuple[int, ...]) -> Placements:
    """Placements of the broadcast `result`, seen from an operand of `shape`: dims it lacks or repeats are whole."""
    offset = len(result) - len(shape)

    def seen(p: Any) -> Any:
        if not isinstance(p, Shard):
            return p
        dim = p.dim - offset
        return Shard(dim) if dim >= 0 and shape[dim] == result[p.dim] else REPLICATE

    return tuple(seen(p) for p in placements)


def cut(value: torch.Tensor, placements: Placements, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part of a plain tensor that is equal on every rank."""
    for _, dim in splits(placements):
        span = owned(mesh, placements, dim, value.shape[dim])
        value = value.narrow(dim, span.lo, span.size)
    return value


def common_layout(tensors: list[Any], shape: tuple[int, ...]) -> Placements:
    """The splits of the result: those of the operand with most split dims, where it is not broadcast."""
    best: Placements = replicated(tensors[0]._spec.mesh)
    for t in tensors:
        offset = len(shape) - len(t._spec.shape)
        kept = tuple(
            Shard(p.dim + offset)
            if isinstance(p, Shard) and t._spec.shape[p.dim] == shape[p.dim + offset]
            else REPLICATE
            for p in t._spec.placements
        )
        if len(splits(kept)) > len(splits(best)):
            best = kept
    return best


def to_parts(
    values: list[Any], shape: tuple[int, ...], target: Placements, mesh: DeviceMesh, cause: Cause
) -> list[torch.Tensor]:
    """Each operand's local part of the broadcast `shape` placed as `target`."""
    parts = []
    for value in values:
        seen = aligned(target, tuple(value.shape), shape)
        parts.append(placed(value, seen, cause) if is_mesh(value) else cut(value, seen, mesh))
    return parts


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise work on summands: allowed where it distributes over the sum, else summed first."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    summands = [t for t in tensors if is_mesh(t) and partial_axes(tuple(t._spec.placements))]
    cause = cause_of(func, args)
    if len(tensors) == 1 and func not in (aten.add.Tensor, aten.sub.Tensor):  # a number would count once per rank
        return like(func(*(_local(a) for a in args), **kwargs), tensors[0])
    if func in (aten.mul.Tensor, aten.div.Tensor):
        other = args[1]
        scalar = not is_mesh(other) and isinstance(other, torch.Tensor) and other.ndim == 0
        if summands[0] is args[0] and scalar:
            return like(func(args[0]._local_tensor, other, **kwargs), args[0])
    elif func is aten.copy_.default:
        old, source = args[0], args[1]  # reached only where autograd accumulates (see operators.accumulates)
        now = tuple(source._spec.placements) if is_mesh(source) else ()
        if is_mesh(source) and old.shape == source.shape and splits(tuple(old._spec.placements)) == splits(now):
            old._local_tensor.copy_(source._local_tensor)
            old._spec = like_spec(old, now)
            return old
    elif len(tensors) == 2 and all(is_mesh(t) for t in args[:2]) and args[0].shape == args[1].shape:
        left, right = args[0], args[1]
        target = tuple(
            b if partial_axes((b,)) else a for a, b in zip(left._spec.placements, right._spec.placements, strict=True)
        )
        # A sum may join summands where gradients accumulate. Else a sum less itself (its mean over one entry), which is
        # exactly nothing, would leave rounding errors.
        alike = left._spec.placements == right._spec.placements
        if alike or torch._C._current_graph_task_id() != -1:
            a, b = placed(left, target, cause), placed(right, target, cause)
            if func is aten.add_.Tensor:  # gradients that accumulate: a sum may become a summand again
                local = a.add_(b, **kwargs)
                left._local_tensor, left._spec = local, like_spec(left, target)
                return left
            return wrap(func(a, b, **kwargs), left._spec.mesh, target, tuple(left._spec.shape), left._ledger)
    if mutable(func) and any(s is args[0] for s in summands):
        raise UnsupportedError(f"{func}: a gradient of shape {tuple(args[0].shape)} cannot take up another shape")
    args = [summed(a, cause) if any(a is s for s in summands) else a for a in args]
    return pointwise(func, args, kwargs)


def like_spec(x: Any, placements: Placements) -> Any:
    """The spec of `x` with other placements."""
    return wrap(x._local_tensor, x._spec.mesh, placements, tuple(x._spec.shape))._spec


def _local(value: Any) -> Any:
    return value._local_tensor if is_mesh(value) else value


@set_pointwise
def pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Any elementwise operator; the result is split as its most split operand."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    extra = [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
    meshed = [t for t in tensors if is_mesh(t)]
    if extra or not meshed or any(isinstance(a, list | tuple) and _has_tensor(a) for a in args):
        return fallback(func, args, kwargs)
    if func in LINEAR and any(partial_axes(tuple(t._spec.placements)) for t in meshed):
        return _linear(func, args, kwargs)
    first = meshed[0]
    mesh = first._spec.mesh
    if len(tensors) == 1 or (
        len(meshed) == len(tensors)
        and all(t._spec.placements == first._spec.placements and t.shape == first.shape for t in meshed)
    ):
        out = func(*(_local(a) for a in args), **kwargs)
        if mutable(func):
            return args[0]
        return _wrapped(out, mesh, tuple(first._spec.placements), tuple(first._spec.shape), first._ledger)
    shape = tuple(torch.broadcast_shapes(*(t.shape for t in tensors)))
    if mutable(func):
        if not is_mesh(args[0]):
            return fallback(func, args, kwargs)
        target = tuple(args[0]._spec.placements)
    else:
        target = common_layout(meshed, shape)
    parts = iter(to_parts(tensors, shape, target, mesh, cause_of(func, args)))
    out = func(*(next(parts) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
    if mutable(func):
        return args[0]
    ledger = next((t._ledger for t in meshed if t._ledger is not None), None)
    return _wrapped(out, mesh, target, shape, ledger)


def _has_tensor(values: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in values)


def _wrapped(out: Any, mesh: DeviceMesh, placements: Placements, shape: tuple[int, ...], ledger: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return wrap(out, mesh, placements, shape, ledger)
    return tuple(_wrapped(o, mesh, placements, shape, ledger) for o in out)


@operator(aten.detach.default, aten.alias.default, aten.lift_fresh.default, linear=True)
def identity(func: Any, args: Any, kwargs: Any) -> Any:
    """The same part under a new handle."""
    return like(func(args[0]._local_tensor), args[0])
