"""Reductions, softmax and scans of statistics over split dims: a local reduction, then one small exchange.

The exchange carries the reduced result only (never the input), so its bytes do not grow with the reduced dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_gather_stack, all_reduce
from meshwright.parallel.layout import Placements, Shares, local_shape, moved, shares, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, fallback, operator, placed
from meshwright.parallel.small import host, tensor
from meshwright.parallel.tensor import wrap

aten = torch.ops.aten


class Reduction:
    """Where a reduction over `dims` of mesh tensor `x` needs other ranks, and how its result is placed."""

    def __init__(self, x: Any, dims: Any, keepdim: bool) -> None:
        self.mesh: DeviceMesh = x._spec.mesh
        self.placements: Placements = tuple(x._spec.placements)
        self.shape: tuple[int, ...] = tuple(x._spec.shape)
        ndim = len(self.shape)
        asked = range(ndim) if dims is None or dims == [] else ([dims] if isinstance(dims, int) else dims)
        self.dims = sorted({dim % ndim for dim in asked}) if ndim else []
        self.axes = [axis for axis, dim in splits(self.placements) if dim in self.dims]
        self.count = math.prod(self.shape[dim] for dim in self.dims)
        kept = [dim for dim in range(ndim) if dim not in self.dims]
        self.out_shape = (
            tuple(1 if dim in self.dims else self.shape[dim] for dim in range(ndim))
            if keepdim
            else tuple(self.shape[dim] for dim in kept)
        )
        self.mapping = tuple(None if dim in self.dims else (dim if keepdim else kept.index(dim)) for dim in range(ndim))
        self.ledger = x._ledger
        self.local: torch.Tensor = x._local_tensor

    @property
    def out_placements(self) -> Placements:
        return moved(self.placements, self.mapping)

    def done(self, local: torch.Tensor) -> Any:
        return wrap(local, self.mesh, self.out_placements, self.out_shape, self.ledger)

    def local_out_shape(self) -> tuple[int, ...]:
        return local_shape(self.mesh, self.out_placements, self.out_shape)

    def empty_here(self) -> bool:
        """This rank has nothing to reduce."""
        return any(self.local.shape[dim] == 0 for dim in self.dims)


def arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name, with the defaults of the operator's schema."""
    named = dict(kwargs)
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name not in named:
            named[argument.name] = argument.default_value
    return named


@operator(aten.sum.default, aten.sum.dim_IntList, linear=True)
def sum_(func: Any, args: Any, kwargs: Any) -> Any:
    """Local sums, added up."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a.get("dim"), a.get("keepdim", False))
    return r.done(_added(aten.sum.dim_IntList, r, a.get("keepdim", False), a["dtype"], cause_of(func, args)))


def _added(sums: Any, r: Reduction, keepdim: bool, dtype: torch.dtype | None, cause: Cause) -> torch.Tensor:
    """Local sums, added up; those of half precision in fp32, rounded once as on one device."""
    out_dtype = dtype or r.local.dtype
    half = bool(r.axes) and out_dtype in (torch.bfloat16, torch.float16)
    local: torch.Tensor = sums(r.local, r.dims, keepdim, dtype=torch.float32 if half else dtype)
    total = all_reduce(local, r.mesh, r.axes, cause) if r.axes else local
    return total.to(out_dtype) if half else total


@operator(aten.nansum.default)
def nansum(func: Any, args: Any, kwargs: Any) -> Any:
    """Local sums of what is a number, added up."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a["dim"], a["keepdim"])
    return r.done(_added(aten.nansum.default, r, a["keepdim"], a["dtype"], cause_of(func, args)))


@operator(aten.mean.default, aten.mean.dim)
def mean(func: Any, args: Any, kwargs: Any) -> Any:
    """The global sum over the global count; half precision is summed in fp32."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a.get("dim"), a.get("keepdim", False))
    dtype = a["dtype"] or r.local.dtype
    if not r.axes:
        return r.done(aten.mean.dim(r.local, r.dims, a.get("keepdim", False), dtype=a["dtype"]))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = aten.sum.dim_IntList(r.local, r.dims, a.get("keepdim", False), dtype=wide)
    return r.done((all_reduce(total, r.mesh, r.axes, cause_of(func, args)) / r.count).to(dtype))


def lowest(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return False
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def highest(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return math.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def extreme_over_ranks(
    local: torch.Tensor, mesh: DeviceMesh, axes: Sequence[int], cause: Cause, largest: bool
) -> torch.Tensor:
    """The largest (smallest) of the ranks' values; NaN wins, as on one device (backends compare it away)."""
    kind = "max" if largest else "min"
    if not local.is_floating_point():
        return all_reduce(local, mesh, axes, cause, kind)
    bad = local.isnan()
    sign = 1.0 if largest else -1.0
    both = torch.stack([local.masked_fill(bad, -sign * math.inf), bad.to(local.dtype) * sign])
    value, flag = all_reduce(both, mesh, axes, cause, kind).unbind(0)
    return value.masked_fill(flag != 0, math.nan)


@operator(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def any_all(func: Any, args: Any, kwargs: Any) -> Any:
    """Logical reductions as the extreme of 0 and 1."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a.get("dim"), a.get("keepdim", False))
    local = func(r.local, *args[1:], **kwargs)
    if not r.axes:
        return r.done(local)
    kind = "max" if "any" in func._schema.name else "min"
    return r.done(all_reduce(local.to(torch.int32), r.mesh, r.axes, cause_of(func, args), kind).to(local.dtype))


@operator(aten.prod.default, aten.prod.dim_int, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def prod(func: Any, args: Any, kwargs: Any) -> Any:
    """Local products multiplied, local counts added."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a.get("dim"), a.get("keepdim", False))
    local = func(r.local, *args[1:], **kwargs)
    kind = "product" if "prod" in func._schema.name else "sum"
    return r.done(all_reduce(local, r.mesh, r.axes, cause_of(func, args), kind) if r.axes else local)


def merged_moments(
    local: torch.Tensor, dims: Sequence[int], mesh: DeviceMesh, parts: Shares, cause: Cause
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over `dims` of the parts of all ranks; dims kept, fp64."""
    wide = local.float() if local.dtype in (torch.bfloat16, torch.float16) else local
    if local.numel():
        var, mean = torch.var_mean(wide, list(dims), correction=0, keepdim=True)
    else:
        shape = [1 if dim in dims else size for dim, size in enumerate(local.shape)]
        var = mean = wide.new_zeros(shape)
    mean, var = (tensor(t) for t in merge_moments(host(torch.stack([mean, var]).double()), mesh, parts, cause))
    return mean, var


def merge_moments(moments: Any, mesh: DeviceMesh, parts: Shares, cause: Cause) -> Any:
    """Mean and biased variance [2, ...] of what ranks hold `parts` of, from their own (fp64; zeros of empty parts).

    They are merged stably (Chan, Golub and LeVeque 1979), so inputs with a large offset keep their variance.
    """
    for axis, each in parts:
        held = host(all_gather_stack(tensor(moments), mesh, axis, cause))
        share = _column(each, held.ndim, moments.device if isinstance(moments, torch.Tensor) else None)
        moments = (held * share).sum(0)
        off = held[:, 0] - moments[0]
        moments[1] += (off * off * share[:, 0]).sum(0)
    return moments


@lru_cache(maxsize=1024)
def _column(values: tuple[float, ...], ndim: int, device: torch.device | None) -> Any:
    """Numbers along the first of `ndim` dims."""
    return host(torch.tensor(values, dtype=torch.float64, device=device).view(-1, *[1] * (ndim - 1)))


@operator(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
def variance(func: Any, args: Any, kwargs: Any) -> Any:
    """Variance from merged moments."""
    a = arguments(func, args, kwargs)
    keepdim = a["keepdim"]
    r = Reduction(a["self"], a["dim"], keepdim)
    if not r.axes:
        out = func(r.local, *args[1:], **kwargs)
        return tuple(r.done(o) for o in out) if isinstance(out, tuple) else r.done(out)
    parts = shares(sizes(r.mesh), r.placements, r.shape, tuple(r.dims))
    local = torch.view_as_real(r.local) if r.local.is_complex() else r.local
    mean, var = merged_moments(local, r.dims, r.mesh, parts, cause_of(func, args))
    if r.local.is_complex():
        mean, var = torch.view_as_complex(mean), var.sum(-1)
    correction = 1 if a["correction"] is None else a["correction"]
    var = var * r.count / max(0, r.count - correction)
    value = var.sqrt() if "std" in func._schema.name else var
    if not keepdim:
        value, mean = value.reshape(r.local_out_shape()), mean.reshape(r.local_out_shape())
    value = r.done(value.to(r.local.dtype.to_real()))
    return (value, r.done(mean.to(r.local.dtype))) if "mean" in func._schema.name else value


@operator(aten.linalg_vector_norm.default)
def vector_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Local norms, combined as the same norm of the ranks' results."""
    a = arguments(func, args, kwargs)
    r = Reduction(a["self"], a["dim"], a["keepdim"])
    order = float(a["ord"])
    if not r.axes:
        return r.done(func(r.local, *args[1:], **kwargs))
    cause = cause_of(func, args)
    if math.isinf(order):
        if r.empty_here():
            local = r.local.new_full(r.local_out_shape(), 0.0 if order > 0 else math.inf)
        else:
            local = func(r.local, order, r.dims, a["keepdim"], dtype=a["dtype"])
        return r.done(extreme_over_ranks(local, r.mesh, r.axes, cause, order > 0))
    dtype = a["dtype"] or r.local.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half else a["dtype"]  # powers leave the range of fp16
    if r.empty_here() and order < 0:  # torch has no such norm of nothing; its share of the sum is 0
        powers = r.local.abs().new_zeros(r.local_out_shape(), dtype=wide)
    else:
        local = func(r.local, order, r.dims, a["keepdim"], dtype=wide)
        powers = local if order == 0 else local**order
    total = all_reduce(powers, r.mesh, r.axes, cause)
    total = total if order == 0 else total ** (1 / order)
    return r.done(total.to(dtype) if half else total)


@operator(aten._softmax.default, aten._log_softmax.default)
def softmax(func: Any, args: Any, kwargs: Any) -> Any:
    """Softmax; over a split dim with the global maximum and sum."""
    x, dim, half_to_float = args
    r = Reduction(x, dim, True)
    if not r.axes:
        return wrap(func(r.local, dim, half_to_float), r.mesh, r.placements, r.shape, r.ledger)
    cause, wide = cause_of(func, args), r.local
    if r.local.dtype in (torch.bfloat16, torch.float16):
        wide = r.local.float()
    out_dtype = torch.float32 if half_to_float else r.local.dtype
    (dim,) = r.dims
    here = wide.amax(dim, keepdim=True) if not r.empty_here() else wide.new_full(r.local_out_shape(), -math.inf)
    top = all_reduce(here, r.mesh, r.axes, cause, "max")  # NaN comes back with the sum
    shifted = wide - top
    total = all_reduce(shifted.exp().sum(dim, keepdim=True), r.mesh, r.axes, cause)
    out = shifted.exp() / total if func is aten._softmax.default else shifted - total.log()
    return wrap(out.to(out_dtype), r.mesh, r.placements, r.shape, r.ledger)


@operator(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
def softmax_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of softmax; over a split dim with the global sum."""
    grad, output, dim, dtype = args
    if grad._spec.placements != output._spec.placements:
        target = tuple(output._spec.placements)
        local = placed(grad, target, cause_of(func, args))
        grad = wrap(local, output._spec.mesh, target, tuple(output._spec.shape), output._ledger)
    r = Reduction(output, dim, True)
    if not r.axes:
        out = func(grad._local_tensor, r.local, dim, dtype)
        return wrap(out, r.mesh, r.placements, r.shape, r.ledger)
    g, cause = grad._local_tensor, cause_of(func, args)
    if func is aten._softmax_backward_data.default:
        total = all_reduce((g * r.local).sum(dim, keepdim=True), r.mesh, r.axes, cause)
        out = r.local * (g - total)
    else:
        total = all_reduce(g.sum(dim, keepdim=True), r.mesh, r.axes, cause)
        out = g - r.local.exp() * total
    return wrap(out.to(dtype), r.mesh, r.placements, r.shape, r.ledger)


@operator(aten._local_scalar_dense.default)
def item(func: Any, args: Any, kwargs: Any) -> Any:
    """The global value of a one-element tensor."""
    return fallback(func, args, kwargs)
