"""Local work of batch norm (and of instance norm of one sample) in half precision on CPUs, by torch's kernels.

Those read half precision and compute in fp32, where expressions would copy the tensor to fp32 and back, in fresh memory
each time: on a volume of 16 × 48 × 96 × 96 that took ten times as long. Inputs are [N, C, *space]; what is per channel
is fp32 [C].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshwright.parallel.kernels import memory_format

HALVES = (torch.bfloat16, torch.float16)


def is_per_channel(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether torch's batch-norm kernels apply: statistics of dim 1 over all others, on a part that is not empty."""
    over = list(dims)
    lone = x.shape[0] == 1 and over == list(range(2, x.ndim)) and x.is_contiguous(memory_format=memory_format(x))
    return x.ndim >= 2 and (over == [0, *range(2, x.ndim)] or lone) and x.numel() > 0


def is_half(x: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether this file's functions apply to `x`."""
    return x.dtype in HALVES and x.device.type == "cpu" and is_per_channel(x, dims)


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance."""
    zeros = x.new_zeros(x.shape[1], dtype=torch.float32)  # fp32 running statistics make the results fp32
    mean, var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
    return mean, var


def scaled(x: torch.Tensor, near: torch.Tensor, scale: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """`(x - near) * scale + level`, computed in fp32 and rounded once."""
    return torch.batch_norm(x, scale, level, near, torch.ones_like(near), False, 0.0, 0.0, False)


def gradient_sums(grad: torch.Tensor, x: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of `grad` and of `grad * (x - near)`."""
    _, product, total = _backward(grad, x, near, torch.ones_like(near), [False, True, True])
    return total, product


def input_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    near: torch.Tensor,
    scale: torch.Tensor,
    slope: torch.Tensor,
    level: torch.Tensor,
) -> torch.Tensor:
    """`grad * scale + (x - near) * slope + level`, rounded three times."""
    direct: torch.Tensor = _backward(grad, x, near, scale, [True, False, False])[0]
    return direct.add_(scaled(x, near, slope, level))


def _backward(
    grad: torch.Tensor, x: torch.Tensor, near: torch.Tensor, scale: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor, ...]:
    """torch's kernel with given statistics: of mean `near` and deviation one."""
    # torch 2.13.0 reads one of the two in the other's memory order where these differ (CPU)
    order = memory_format(x)
    grad, x = grad.contiguous(memory_format=order), x.contiguous(memory_format=order)
    one = torch.ones_like(near)
    found: tuple[torch.Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, near, one, None, None, False, 0.0, mask
    )
    return found
