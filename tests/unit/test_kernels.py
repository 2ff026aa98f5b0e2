"""Local convolutions in twice the width, where torch's own kernels go wrong."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import meshwright as mw
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


def drawn_convolutions() -> list[str]:
    """Small shapes with every setting: which of them differ from the same in twice the width."""
    draw, wrong = random.Random(0), []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        for _ in range(400):
            n = draw.choice((1, 2, 3))
            sizes, kernel = (
                tuple(draw.choice(of) for _ in range(n)) for of in ((1, 2, 3, 4, 5, 8, 9, 16), (1, 2, 3, 4))
            )
            conv = Conv(
                tuple(draw.choice((1, 1, 2, 3, 4)) for _ in sizes), tuple(draw.choice((1, 1, 2)) for _ in sizes), 1
            )
            pads = tuple((draw.choice((0, 1, 1, 2, 3)), draw.choice((0, 1, 2))) for _ in sizes)
            reaches = [d * (k - 1) + 1 for d, k in zip(conv.dilation, kernel, strict=True)]
            room = [size + sum(ends) - reach for size, ends, reach in zip(sizes, pads, reaches, strict=True)]
            if min(room) < 0:
                continue
            outputs = tuple(free // stride + 1 for free, stride in zip(room, conv.stride, strict=True))
            channels, filters = draw.choice((2, 3, 16)), draw.choice((1, 3, 16))
            x = torch.randn(draw.choice((1, 2)), channels, *sizes).to(dtype)
            weight, grad = torch.randn(filters, channels, *kernel).to(dtype), torch.randn(x.shape[0], filters, *outputs)
            if n > 1 and draw.random() < 0.7:
                x = x.to(memory_format=torch.channels_last if n == 2 else torch.channels_last_3d)
            junk = [torch.full_like(t, torch.nan) for t in (x, weight) for _ in range(5)]  # what unwritten memory holds
            del junk
            grad, given = grad.to(dtype), (x, weight)
            found = (
                conv_forward(*given, None, conv, pads, outputs),
                *conv_backward(grad, *given, conv, pads, (True,) * 3),
            )
            exact = [t.to(wide) for t in given]
            truth = (
                conv_forward(exact[0], exact[1], None, conv, pads, outputs),
                *conv_backward(grad.to(wide), exact[0], exact[1], conv, pads, (True,) * 3),
            )
            for name, ours, true in zip(("y", "d_x", "d_weight", "d_bias"), found, truth, strict=True):
                assert ours is not None
                assert true is not None
                bound = 0.02 if dtype != torch.float32 else 1e-4
                if not (ours.to(wide) - true).abs().max() <= bound * true.abs().max() + 1e-6:
                    wrong.append(f"{name} {dtype} {tuple(x.shape)} {kernel} {conv} {pads}")
    return wrong


def test_drawn_convolutions() -> None:
    """torch's own kernels crash or are wrong on one in a hundred (therefore in a process of its own)."""
    assert mw.launch(drawn_convolutions, ranks=1) == [[]]
