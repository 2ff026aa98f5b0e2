"""Local convolutions against fp32 where torch's own half-precision kernels go wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from meshwright.parallel.kernels import Conv, conv_backward, conv_forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_gradients_of_thin_volumes_in_halves(kernel: int, dtype: torch.dtype) -> None:
    """torch leaves parts of the weight's gradient unwritten where a volume is thinner than a padded kernel."""
    torch.manual_seed(0)
    for depth, pad, dilation in itertools.product(range(1, 6), range(1, 3), (1, 2)):
        outputs = depth + 2 * pad - dilation * (kernel - 1)
        if outputs < 1:
            continue
        conv, pads = Conv((1, 1, 1), (dilation, 1, 1), 1), ((pad, pad), (1, 1), (1, 1))
        x = torch.randn(1, 4, depth, 5, 6).to(dtype).to(memory_format=torch.channels_last_3d)
        weight = torch.randn(6, 4, kernel, 3, 3).to(dtype)
        grad = torch.randn(1, 6, outputs, 5, 6).to(dtype)
        junk = [torch.full_like(weight, torch.nan) for _ in range(20)]  # what unwritten memory holds next
        del junk
        y = conv_forward(x, weight, None, conv, pads, (outputs, 5, 6))
        found = conv_backward(grad, x, weight, conv, pads, (True, True, True))
        wide = x.float(), weight.float()
        truth = conv_backward(grad.float(), *wide, conv, pads, (True, True, True))
        for ours, exact in zip(
            (y, *found), (conv_forward(*wide, None, conv, pads, (outputs, 5, 6)), *truth), strict=True
        ):
            assert ours is not None
            assert exact is not None
            assert (ours.float() - exact).abs().max() <= 0.02 * exact.abs().max(), (depth, pad, dilation)
