"""Standardising local parts with the moments of all ranks: what batch, instance, group, layer and RMS norm share.

Only moments travel: mean, squared deviations and count of each group forward, two sums of each group backward.
The gradient is that of Ioffe and Szegedy (2015), section 3, with sums over all ranks that share a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel import norm_kernels
from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.layout import Shares
from meshwright.parallel.node import Node
from meshwright.parallel.norm_kernels import is_per_channel
from meshwright.parallel.rules.reduce import merge_moments
from meshwright.parallel.small import host, tensor


def wide_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.bfloat16, torch.float16) else t.dtype


class Total(Node):
    """The sum of local tensors over the ranks along `axes`, which each of them goes on with in its own way: so the
    gradient of every summand is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, mesh: DeviceMesh, axes: tuple[int, ...], cause: Cause) -> torch.Tensor:
        ctx.constants = mesh, axes, cause
        return all_reduce(local, mesh, axes, cause)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Total.apply(grad, *ctx.constants), None, None, None


def _centred(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """`x` (wide) less a value near its mean, that value, and the local mean and biased variance (fp64; dims kept).

    Two passes, so that an offset costs no digits; `torch.var_mean` takes 25 times as long on channels_last.
    """
    here = math.prod(x.shape[dim] for dim in dims)
    near = x.sum(dims, keepdim=True) / max(1, here)
    centred = x - near
    if is_per_channel(x, dims):
        rest, var = (tensor(t).view(near.shape) for t in norm_kernels.moments(centred)[0])
        return centred, near, near + rest, var
    rest = centred.sum(dims, keepdim=True).double() / max(1, here)
    var = centred.square().sum(dims, keepdim=True).double() / max(1, here) - rest * rest
    return centred, near, near + rest, var


def _gradient_sums(g: torch.Tensor, centred: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sums of `g` and of `g * centred` over `dims` (kept), stacked, in fp64."""
    if is_per_channel(g, dims):
        zeros, ones = g.new_zeros(g.shape[1]), g.new_ones(g.shape[1])
        sums = norm_kernels.gradient_sums(g, centred, zeros, ones, 0.0)
        return tensor(sums).view(2, 1, -1, *(1 for _ in g.shape[2:]))
    return torch.stack([t.sum(dims, keepdim=True).double() for t in (g, g * centred)])


class Standardize(Node):
    """`(x - mean) / sqrt(var + eps) * weight + bias` on local parts, moments over `dims` and the ranks of `axes`.

    `weight` and `bias` broadcast against `x`; `even`: as one number for all values that share statistics, on every
    rank. Also returns mean and biased variance (fp64, dims kept). `parts`: what ranks hold of the values.
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
        parts: Shares,
        cause: Cause,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = wide_dtype(x)
        y, near, mean64, var64 = _centred(x.to(wide), dims)
        own = host(torch.stack([mean64, var64]))
        mean64, var64 = (tensor(t) for t in merge_moments(own, mesh, parts, cause))
        shift, rstd = (mean64 - near).to(wide), (var64 + eps).rsqrt().to(wide)
        if even:
            scale = rstd if weight is None else rstd * weight.to(wide)
            moved = -shift * scale if bias is None else bias.to(wide) - shift * scale
            norm_kernels.shifted(y, scale, moved)
        else:
            y.sub_(shift).mul_(rstd if weight is None else rstd * weight.to(wide))
            if bias is not None:
                y.add_(bias)
        axes = tuple(axis for axis, _ in parts)
        ctx.constants = dims, even, count, eps, mesh, axes, cause, None if bias is None else tuple(bias.shape)
        ctx.save_for_backward(x, weight, near, shift, rstd, mean64)
        ctx.mark_non_differentiable(mean64, var64)
        return y.to(x.dtype), mean64, var64

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        dims, even, count, eps, mesh, axes, cause, bias_shape = ctx.constants
        x, weight, near, shift, rstd, known = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            constants = dims, count, eps, mesh, axes, cause
            return *differentiable(x, weight, known, grad, constants, bias_shape, ctx.needs_input_grad[0]), *(None,) * 7
        wide, rest = wide_dtype(x), (None,) * 7
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
        first, second = all_reduce(torch.stack([first, second]), mesh, axes, cause) / max(1, count)
        # rstd * w * (g - first - normal * second), normal = (centred - shift) * rstd
        scale = rstd.double() if weight is None else rstd.double() * weight
        slope = -scale * second * rstd
        level = -scale * first - slope * shift
        scale, slope, level = (t.to(wide) for t in (scale, slope, level))
        d_x = norm_kernels.shifted(centred, slope, level).addcmul_(g, scale)
        return d_x.to(x.dtype), d_weight, d_bias, *rest


def _summed_to(sums: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sums in the shape of a weight, which is empty where it was cut along with an empty part."""
    return sums.new_zeros(shape) if 0 in shape else sums.sum_to_size(shape)


def differentiable(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    known: torch.Tensor,
    grad: torch.Tensor,
    constants: tuple[Any, ...],
    bias_shape: tuple[int, ...] | None,
    asks_x: bool,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for `x`, weight and bias as an expression that autograd follows. `known` is the mean of all ranks;
    the moments are taken again."""
    dims, count, eps, mesh, axes, cause = constants
    wide = wide_dtype(x)
    centred = x.to(wide) - known.to(wide)  # near the mean, so that the sums below keep their digits
    sums = torch.stack([centred.sum(dims, keepdim=True), (centred * centred).sum(dims, keepdim=True)])
    mean, square = Total.apply(sums, mesh, axes, cause) / max(1, count)
    rstd = (square - mean * mean + eps).rsqrt()
    normal = (centred - mean) * rstd
    g = grad.to(wide)
    d_bias = None if bias_shape is None else g.sum_to_size(bias_shape)
    d_weight = None if weight is None else (g * normal).sum_to_size(weight.shape).to(weight.dtype)
    if not asks_x:
        return None, d_weight, d_bias
    if weight is not None:
        g = g * weight.to(wide)
    sums = torch.stack([g.sum(dims, keepdim=True), (g * normal).sum(dims, keepdim=True)])
    first, second = Total.apply(sums, mesh, axes, cause) / max(1, count)
    return ((g - first - normal * second) * rstd).to(x.dtype), d_weight, d_bias
