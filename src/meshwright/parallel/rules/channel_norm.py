"""Standardising each channel of local parts by torch's batch-norm kernels, with the moments of all ranks.

Batch norm, and instance norm of one sample. A part is read twice and written once forward, as by one device: first its
own moments, then, when the ranks have told each other theirs, the result. Backward likewise: two sums a channel, then
a combination of gradient and input. Sources: see `standardize.py`, which takes what lies so far from zero that
sums would lose digits; both send the same, so each rank chooses for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import Shares
from meshwright.parallel.norm_kernels import gradient_sums, input_gradient
from meshwright.parallel.rules.reduce import merge_moments
from meshwright.parallel.rules.standardize import differentiable, wide_dtype


class ChannelNorm(Function):
    """`(x - mean) / sqrt(var + eps) * weight + bias` on local parts [N, C, *space], of each channel over the `parts`.

    `mean` and `var` are the local moments [C] (fp64). Also returns those of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        count: int,
        eps: float,
        mesh: DeviceMesh,
        parts: Shares,
        cause: Cause,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, var = merge_moments(mean, var, mesh, parts, cause)
        wide = wide_dtype(x)
        near, spread = torch.stack([mean, var]).to(wide).unbind()
        w, b = (None if value is None else value.to(wide) for value in (weight, bias))
        y = torch.batch_norm(x, w, b, near, spread, False, 0.0, eps, False) if x.numel() else torch.empty_like(x)
        axes = tuple(axis for axis, _ in parts)
        ctx.constants = count, eps, mesh, axes, cause
        ctx.save_for_backward(x, weight, bias, near, spread, mean)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        count, eps, mesh, axes, cause = ctx.constants
        x, weight, bias, near, spread, mean = ctx.saved_tensors
        asks_x, rest = ctx.needs_input_grad[0], (None,) * 7
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            view = (1, -1, *(1 for _ in x.shape[2:]))
            constants = (0, *range(2, x.ndim)), count, eps, mesh, axes, cause
            w = None if weight is None else weight.view(view)
            shape = None if bias is None else tuple(bias.view(view).shape)
            found = differentiable(x, w, mean.view(view), grad, constants, shape, asks_x)
            return found[0], *(None if d is None else d.flatten() for d in found[1:]), *rest
        grad = grad.contiguous(memory_format=memory_format(x))
        sums = gradient_sums(grad, x, near, spread, eps)
        d_bias = None if bias is None else sums[0].to(bias.dtype)
        d_weight = None if weight is None else sums[1].to(weight.dtype)
        if not asks_x:
            return None, d_weight, d_bias, *rest
        first, second = all_reduce(sums, mesh, axes, cause).div_(max(1, count)).unbind()
        # scale * (g - first - normal * second), normal = (x - mean) * rstd
        rstd = (spread.double() + eps).rsqrt_()
        scale = rstd if weight is None else rstd * weight
        slope = -scale * second * rstd
        level = -scale * first - slope * near
        per_channel = torch.stack([scale, slope, level]).to(near.dtype)
        return input_gradient(grad, x, *per_channel.unbind()), d_weight, d_bias, *rest
