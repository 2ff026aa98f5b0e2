"""Standardising each channel of local parts by torch's batch-norm kernels, with the moments of all ranks.

Batch norm, and instance norm of one sample. A part is read twice and written once forward, as by one device: first its
own moments, then, when the ranks have told each other theirs, the result. Backward likewise: two sums a channel, then
a combination of gradient and input. Sources: see `standardize.py`, which takes what lies so far from zero that
sums would lose digits; both send the same, so each rank chooses for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.node import Node
from meshwright.parallel.norm_kernels import gradient_sums, input_gradient
from meshwright.parallel.rules.standardize import differentiable, wide_dtype
from meshwright.parallel.small import host, stacked, tensor


class ChannelNorm(Node):
    """`(x - mean) / sqrt(var + eps) * weight + bias` on local parts [N, C, *space].

    `moments` [2, C] are mean and variance of all that the ranks along `axes` hold, `count` values a channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        moments: Any,
        count: int,
        eps: float,
        mesh: DeviceMesh,
        axes: tuple[int, ...],
        cause: Cause,
    ) -> torch.Tensor:
        wide = wide_dtype(x)
        near, spread = tensor(moments, wide).unbind()
        w = weight if weight is None or weight.dtype is wide else weight.to(wide)
        b = bias if bias is None or bias.dtype is wide else bias.to(wide)
        ctx.constants = moments, count, eps, mesh, axes, cause
        ctx.save_for_backward(x, weight, bias, near, spread)
        return torch.batch_norm(x, w, b, near, spread, False, 0.0, eps, False) if x.numel() else torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        moments, count, eps, mesh, axes, cause = ctx.constants
        x, weight, bias, near, spread = ctx.saved_tensors
        asks_x, rest = ctx.needs_input_grad[0], (None,) * 6
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            view = (1, -1, *(1 for _ in x.shape[2:]))
            constants = (0, *range(2, x.ndim)), count, eps, mesh, axes, cause
            w = None if weight is None else weight.view(view)
            shape = None if bias is None else tuple(bias.view(view).shape)
            found = differentiable(x, w, tensor(moments[0]).view(view), grad, constants, shape, asks_x)
            return found[0], *(None if d is None else d.flatten() for d in found[1:]), *rest
        grad = grad.contiguous(memory_format=memory_format(x))
        sums = gradient_sums(grad, x, near, spread, eps)
        d_bias = None if bias is None else tensor(sums[0]).to(bias.dtype)
        d_weight = None if weight is None else tensor(sums[1]).to(weight.dtype)
        if not asks_x:
            return None, d_weight, d_bias, *rest
        first, second = host(all_reduce(tensor(sums), mesh, axes, cause)) / max(1, count)
        # scale * (g - first - normal * second), normal = (x - mean) * rstd
        rstd = (moments[1] + eps) ** -0.5
        scale = rstd if weight is None else rstd * host(weight.detach().to(near.dtype))
        slope = -scale * second * rstd
        level = -scale * first - slope * moments[0]
        per_channel = tensor(stacked([scale, slope, level]), near.dtype)
        return input_gradient(grad, x, *per_channel.unbind()), d_weight, d_bias, *rest
