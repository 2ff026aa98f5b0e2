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
from meshwright.parallel.rules.reduce import merge_moments


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


def _per_channel(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether torch's batch-norm kernels apply: statistics of dim 1 over all others, on a part that is not empty."""
    return x.ndim >= 2 and list(dims) == [0, *range(2, x.ndim)] and x.numel() > 0


def _centred(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """`x` (wide) less a value near its mean, that value, and the local mean and squared deviations (fp64; dims kept).

    Two passes, so that an offset costs no digits; `torch.var_mean` takes 25 times as long on channels_last.
    """
    here = math.prod(x.shape[dim] for dim in dims)
    near = x.sum(dims, keepdim=True) / max(1, here)
    centred = x - near
    if _per_channel(x, dims):
        rest, var = (m.double().view(near.shape) for m in torch.batch_norm_update_stats(centred, None, None, 0.0))
        return centred, near, near + rest, var * here
    rest = centred.sum(dims, keepdim=True).double() / max(1, here)
    deviation = centred.square().sum(dims, keepdim=True).double() - here * rest * rest
    return centred, near, near + rest, deviation


def _gradient_sums(g: torch.Tensor, centred: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sums of `g` and of `g * centred` over `dims` (kept), stacked, in fp64."""
    if _per_channel(g, dims):
        zero, one = g.new_zeros(g.shape[1]), g.new_ones(g.shape[1])
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            g, centred, None, zero, one, None, None, False, 0.0, [False, True, True]
        )
        view = [1, -1, *(1 for _ in dims[1:])]
        return torch.stack([total.double().view(view), product.double().view(view)])
    return torch.stack([t.sum(dims, keepdim=True).double() for t in (g, g * centred)])


class Standardize(Function):
    """`(x - mean) / sqrt(var + eps) * weight + bias` on local parts, moments over `dims` and the ranks of `axes`.

    `weight` and `bias` broadcast against `x`; `even`: as one number for all values that share statistics, on every
    rank. Also returns mean and biased variance (fp64, dims kept).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dims: tuple[int, ...],
        even: bool,
        count: int,
        eps: float,
        mesh: DeviceMesh,
        axes: tuple[int, ...],
        cause: Cause,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = _wide(x)
        here = math.prod(x.shape[dim] for dim in dims)
        y, near, mean64, deviation = _centred(x.to(wide), dims)
        mean64, deviation = merge_moments(mean64, deviation, here, mesh, axes, cause)
        var64 = deviation / max(1, count)
        shift, rstd = (mean64 - near).to(wide), (var64 + eps).rsqrt().to(wide)
        if even:
            scale = rstd if weight is None else rstd * weight.to(wide)
            moved = -shift * scale if bias is None else bias.to(wide) - shift * scale
            torch.addcmul(moved, y, scale, out=y)
        else:
            y.sub_(shift).mul_(rstd if weight is None else rstd * weight.to(wide))
            if bias is not None:
                y.add_(bias)
        ctx.constants = dims, even, count, mesh, axes, cause, None if bias is None else tuple(bias.shape)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, near, shift, rstd, mean64.to(wide))
        ctx.mark_non_differentiable(mean64, var64)
        return y.to(x.dtype), mean64, var64

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            return *_differentiable(ctx, grad), *(None,) * 7
        dims, even, count, mesh, axes, cause, bias_shape = ctx.constants
        x, weight, near, shift, rstd, _ = ctx.saved_tensors
        wide, rest = _wide(x), (None,) * 7
        g, centred = grad.to(wide), x.to(wide) - near
        if not even:
            normal = (centred - shift).mul_(rstd)
            d_bias = None if bias_shape is None else g.sum_to_size(bias_shape)
            product = g * normal
            d_weight = None if weight is None else product.sum_to_size(weight.shape).to(weight.dtype)
            if not ctx.needs_input_grad[0]:
                return None, d_weight, d_bias, *rest
            if weight is not None:
                g, product = g * weight.to(wide), product * weight.to(wide)
            sums = torch.stack([g.sum(dims, keepdim=True), product.sum(dims, keepdim=True)])
            first, second = all_reduce(sums, mesh, axes, cause) / max(1, count)
            d_x = normal.mul_(-second).add_(g).sub_(first).mul_(rstd)
            return d_x.to(x.dtype), d_weight, d_bias, *rest
        first, second = _gradient_sums(g, centred, dims)
        second = (second - first * shift) * rstd  # over g and g * normal
        d_bias = None if bias_shape is None else _summed_to(first, bias_shape).to(wide)
        d_weight = None if weight is None else _summed_to(second, tuple(weight.shape)).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, *rest
        first, second = all_reduce(torch.stack([first, second]).to(wide), mesh, axes, cause).double() / max(1, count)
        # rstd * w * (g - first - normal * second), normal = (centred - shift) * rstd
        scale = rstd.double() if weight is None else rstd.double() * weight
        slope = -scale * second * rstd
        level = -scale * first - slope * shift
        d_x = torch.addcmul(level.to(wide), centred, slope.to(wide), out=centred).addcmul_(g, scale.to(wide))
        return d_x.to(x.dtype), d_weight, d_bias, *rest


def _summed_to(sums: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sums in the shape of a weight, which is empty where it was cut along with an empty part."""
    return sums.new_zeros(shape) if 0 in shape else sums.sum_to_size(shape)


def _differentiable(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The same gradients as an expression that autograd follows; the moments are those of `x` again."""
    dims, _, count, mesh, axes, cause, bias_shape = ctx.constants
    x, weight, *_, known = ctx.saved_tensors
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
        all(view[dim] == 1 for dim in dims) or (weight is None and bias is None),
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
