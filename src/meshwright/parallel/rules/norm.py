"""Batch, instance, group and layer norm with the statistics of the whole sample (and batch).

Only moments travel: mean, squared deviations and count of each group forward, two sums of each group backward.
The gradient is that of Ioffe and Szegedy (2015), section 3, with sums over all ranks that share a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.functions import (
    as_mesh,
    cause_for,
    function,
    gathered,
    mesh_of,
    placements_of,
)
from meshwright.parallel.layout import Placements, axis_of, split_axes, splits
from meshwright.parallel.redistribute import from_local, replicate, to_local
from meshwright.parallel.rules.pointwise import aligned, cut
from meshwright.parallel.rules.reduce import merged_moments


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.bfloat16, torch.float16) else t.dtype


class _Total(Function):
    """The sum of local tensors over the ranks along `axes`, which each of them goes on with in its own way: so the
    gradient of every summand is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, mesh: DeviceMesh, axes: tuple[int, ...], cause: Cause) -> torch.Tensor:
        ctx.constants = mesh, axes, cause
        return all_reduce(local, mesh, axes, cause)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Total.apply(grad, *ctx.constants), None, None, None


class Standardize(Function):
    """`(x - mean) / sqrt(var + eps) * weight + bias` on local parts, moments over `dims` and the ranks of `axes`.

    `weight` and `bias` broadcast against `x`. Also returns mean and biased variance (fp64, dims kept).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dims: tuple[int, ...],
        count: int,
        eps: float,
        mesh: DeviceMesh,
        axes: tuple[int, ...],
        cause: Cause,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = _wide(x)
        mean64, deviation = merged_moments(x, dims, mesh, axes, cause)
        var64 = deviation / max(1, count)
        mean, rstd = mean64.to(wide), (var64 + eps).rsqrt().to(wide)
        y = (x.to(wide) - mean).mul_(rstd if weight is None else rstd * weight.to(wide))
        if bias is not None:
            y.add_(bias)
        ctx.constants = dims, count, mesh, axes, cause, None if bias is None else tuple(bias.shape)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean64, var64)
        return y.to(x.dtype), mean64, var64

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return *_differentiable(ctx, grad), None, None, None, None, None, None
        dims, count, mesh, axes, cause, bias_shape = ctx.constants
        x, weight, mean, rstd = ctx.saved_tensors
        wide = _wide(x)
        g = grad.to(wide)
        normal = (x.to(wide) - mean).mul_(rstd)
        d_bias = None if bias_shape is None else g.sum_to_size(bias_shape)
        product = g * normal
        d_weight = None if weight is None else product.sum_to_size(weight.shape).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None, None, None, None, None
        if weight is not None:
            w = weight.to(wide)
            g, product = g * w, product * w  # not in place: where nothing was summed, `product` is d_weight
        sums = torch.stack([g.sum(dims, keepdim=True), product.sum(dims, keepdim=True)])
        first, second = all_reduce(sums, mesh, axes, cause) / max(1, count)
        d_x = normal.mul_(-second).add_(g).sub_(first).mul_(rstd)
        return d_x.to(x.dtype), d_weight, d_bias, None, None, None, None, None, None


def _differentiable(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The same gradients as an expression that autograd follows; the moments are those of `x` again."""
    dims, count, mesh, axes, cause, bias_shape = ctx.constants
    x, weight, known, _ = ctx.saved_tensors
    wide = _wide(x)
    centred = x.to(wide) - known  # near the mean, so that the sums below keep their digits
    sums = torch.stack([centred.sum(dims, keepdim=True), (centred * centred).sum(dims, keepdim=True)])
    mean, square = _Total.apply(sums, mesh, axes, cause) / max(1, count)
    rstd = (square - mean * mean + ctx.eps).rsqrt()
    normal = (centred - mean) * rstd
    g = grad.to(wide)
    d_bias = None if bias_shape is None else g.sum_to_size(bias_shape)
    d_weight = None if weight is None else (g * normal).sum_to_size(weight.shape).to(weight.dtype)
    if not ctx.needs_input_grad[0]:
        return None, d_weight, d_bias
    if weight is not None:
        g = g * weight.to(wide)
    sums = torch.stack([g.sum(dims, keepdim=True), (g * normal).sum(dims, keepdim=True)])
    first, second = _Total.apply(sums, mesh, axes, cause) / max(1, count)
    return ((g - first - normal * second) * rstd).to(x.dtype), d_weight, d_bias


def _affine(
    value: Any,
    view: Sequence[int],
    shape: tuple[int, ...],
    placements: Placements,
    axes: tuple[int, ...],
    cause: Cause,
) -> torch.Tensor | None:
    """A weight or bias as a local tensor that broadcasts as `view`: whole, or cut where it spans a split dim."""
    if value is None:
        return None
    value = value.reshape(list(view))
    seen = aligned(placements, tuple(view), shape)
    return cut(to_local(replicate(value, cause), axes), seen, value._spec.mesh)  # its gradient: a summand


def _standardize(
    x: Any, weight: Any, bias: Any, view: Sequence[int], dims: Sequence[int], eps: float, cause: Cause
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Mesh tensor `x` standardised over `dims`; `view` is the shape in which weight and bias broadcast."""
    placements, shape = placements_of(x), tuple(x.shape)
    axes = split_axes(placements)
    mine = tuple(axis for axis, dim in splits(placements) if dim in dims)
    y, mean, var = Standardize.apply(
        to_local(x),
        _affine(weight, view, shape, placements, axes, cause),
        _affine(bias, view, shape, placements, axes, cause),
        tuple(dims),
        math.prod(shape[dim] for dim in dims),
        eps,
        x._spec.mesh,
        mine,
        cause,
    )
    return from_local(y, x._spec.mesh, placements, shape, cause.ledger), mean, var


@function(F.batch_norm, torch.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Per channel over the whole batch and space; running statistics equal to those of one device."""
    mesh = mesh_of(input, weight, running_mean)
    x = gathered(as_mesh(input, mesh), [1], "batch_norm")
    weight, bias, running_mean, running_var = (as_mesh(v, mesh) for v in (weight, bias, running_mean, running_var))
    placements, shape = placements_of(x), tuple(x.shape)
    cause, axes = cause_for("batch_norm", x, weight), split_axes(placements)
    if not training or not axes:
        mean, var = (None if v is None else to_local(v) for v in (running_mean, running_var))
        w, b = (None if v is None else to_local(v, axes) for v in (weight, bias))
        y = F.batch_norm(to_local(x), mean, var, w, b, training, 0.0 if momentum is None else momentum, eps)
        return from_local(y, mesh, placements, shape, cause.ledger)
    count = math.prod(shape) // max(1, shape[1])
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    view = [1, shape[1], *(1 for _ in shape[2:])]
    dims = [0, *range(2, len(shape))]
    y, mean, var = _standardize(x, weight, bias, view, dims, eps, cause)
    if running_mean is not None and momentum is not None:
        _update(running_mean, mean, momentum)
        _update(running_var, var * (count / (count - 1)), momentum)
    return y


def _update(running: Any, value: torch.Tensor, momentum: float) -> None:
    """The exponential average of one device, on the replicated buffer."""
    with torch.no_grad():
        local = running._local_tensor
        local.lerp_(value.flatten().to(local.dtype), momentum)
        running.add_(0)  # the mesh tensor was written to: its version moves on


@function(F.instance_norm, torch.instance_norm)
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Per sample and channel over the whole space."""
    mesh = mesh_of(input, weight, running_mean)
    x = gathered(as_mesh(input, mesh), [1], "instance_norm")
    weight, bias, running_mean, running_var = (as_mesh(v, mesh) for v in (weight, bias, running_mean, running_var))
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    shape = tuple(x.shape)
    count = math.prod(shape[2:])
    if count <= 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {shape}")
    cause, dims = cause_for("instance_norm", x, weight), list(range(2, len(shape)))
    view = [1, shape[1], *(1 for _ in dims)]
    y, mean, var = _standardize(x, weight, bias, view, dims, eps, cause)
    if running_mean is not None:
        axis = axis_of(placements_of(x), 0)
        packed = torch.stack([mean.flatten(1).sum(0), var.flatten(1).sum(0) * (count / (count - 1))])
        packed = all_reduce(packed, mesh, [] if axis is None else [axis], cause) / shape[0]
        _update(running_mean, packed[0], momentum)
        _update(running_var, packed[1], momentum)
    return y


@function(F.group_norm, torch.group_norm)
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Per sample and group of channels over the whole space."""
    mesh = mesh_of(input, weight, bias)
    x = gathered(as_mesh(input, mesh), [1], "group_norm")
    weight, bias = as_mesh(weight, mesh), as_mesh(bias, mesh)
    placements, shape = placements_of(x), tuple(x.shape)
    if shape[1] % num_groups:
        raise RuntimeError(f"group_norm: {shape[1]} channels are not divisible by num_groups={num_groups}")
    cause, axes = cause_for("group_norm", x, weight), split_axes(placements)
    if shape[0] * (shape[1] // num_groups) * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if not any(dim >= 2 for _, dim in splits(placements)):
        w, b = (None if v is None else to_local(v, axes) for v in (weight, bias))
        y = torch.group_norm(to_local(x), num_groups, w, b, eps)  # without the check, which is for the whole batch
        return from_local(y, mesh, placements, shape, cause.ledger)
    per = shape[1] // num_groups
    grouped = x.unflatten(1, (num_groups, per))
    view = [1, num_groups, per, *(1 for _ in shape[2:])]
    y, _, _ = _standardize(grouped, weight, bias, view, list(range(2, len(shape) + 1)), eps, cause)
    return y.flatten(1, 2)


@function(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Over the trailing dims, split or not."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = (as_mesh(v, mesh) for v in (input, weight, bias))
    placements, shape = placements_of(x), tuple(x.shape)
    trailing = len(normalized_shape)
    if tuple(normalized_shape) != shape[len(shape) - trailing :]:
        raise RuntimeError(f"layer_norm: normalized_shape {tuple(normalized_shape)} does not end the input {shape}")
    cause, axes = cause_for("layer_norm", x, weight), split_axes(placements)
    dims = list(range(len(shape) - trailing, len(shape)))
    if not any(dim in dims for _, dim in splits(placements)):
        w, b = (None if v is None else to_local(replicate(v), axes) for v in (weight, bias))
        y = F.layer_norm(to_local(x), list(normalized_shape), w, b, eps)
        return from_local(y, mesh, placements, shape, cause.ledger)
    view = [1] * (len(shape) - trailing) + list(normalized_shape)
    y, _, _ = _standardize(x, weight, bias, view, dims, eps, cause)
    return y
