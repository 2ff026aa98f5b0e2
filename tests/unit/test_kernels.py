"""Local convolutions in twice the width, where torch's own kernels go wrong."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.parallel.kernels import conv_backward, conv_forward
from meshwright.parallel.signature import Conv


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


Shapes = tuple[torch.dtype, tuple[int, ...], int, tuple[int, ...], Conv, tuple[tuple[int, int], ...]]

KNOWN: dict[
    str, Shapes
] = {  # shapes at which torch 2.13.0 is wrong on a processor with AVX512 and AMX, by what avoids it
    "one output, fp32": (torch.float32, (2, 1, 8, 5), 16, (3, 4), Conv((1, 4), (1, 1), 1), ((1, 1), (1, 1))),
    "one output": (torch.bfloat16, (1, 3, 5, 1), 3, (3, 2), Conv((1, 4), (1, 2), 1), ((2, 2), (3, 1))),
    "thin": (torch.bfloat16, (1, 3, 1, 4, 9), 3, (3, 4, 2), Conv((1, 2, 2), (1, 1, 1), 1), ((1, 2), (0, 0), (1, 1))),
    "thin when cut": (
        *(torch.bfloat16, (2, 3, 3, 9, 16), 16, (2, 2, 3), Conv((4, 2, 4), (1, 1, 1), 1)),
        ((1, 1), (3, 2), (3, 1)),
    ),
    "kernel and stride 4": (torch.bfloat16, (1, 16, 16, 16), 16, (4, 4), Conv((4, 4), (1, 1), 1), ((0, 0), (0, 0))),
    "strides that differ": (
        *(torch.bfloat16, (1, 16, 16, 16, 5), 16, (1, 4, 4), Conv((4, 4, 1), (1, 1, 1), 1)),
        ((2, 2), (2, 1), (0, 0)),
    ),
    "odd filters": (
        *(torch.bfloat16, (1, 16, 12, 12, 20), 1, (5, 5, 5), Conv((4, 4, 4), (1, 1, 1), 1)),
        ((2, 2), (1, 1), (3, 3)),
    ),
}


def _wrong(
    dtype: torch.dtype, shape: tuple[int, ...], filters: int, kernel: tuple[int, ...], conv: Conv, pads: Any
) -> str:
    """Which of the output and the gradients differ from the same in twice the width, in either memory order."""
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    reaches = (d * (k - 1) + 1 for d, k in zip(conv.dilation, kernel, strict=True))
    per_dim = zip(shape[2:], pads, reaches, conv.stride, strict=True)
    outputs = tuple((size + sum(ends) - reach) // stride + 1 for size, ends, reach, stride in per_dim)
    wrong = ""
    for memory in (torch.contiguous_format, {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))):
        if memory is None:
            continue
        x = torch.randn(shape).to(dtype).to(memory_format=memory)
        weight = torch.randn(filters, shape[1], *kernel).to(dtype)
        grad = torch.randn(shape[0], filters, *outputs).to(dtype)
        junk = [torch.full_like(t, torch.nan) for t in (x, weight, grad) for _ in range(5)]  # what fresh memory holds
        del junk
        found = (
            conv_forward(x, weight, None, conv, pads, outputs),
            *conv_backward(grad, x, weight, conv, pads, (True, True, True)),
        )
        exact = x.to(wide), weight.to(wide)
        truth = (
            conv_forward(*exact, None, conv, pads, outputs),
            *conv_backward(grad.to(wide), *exact, conv, pads, (True, True, True)),
        )
        for name, ours, true in zip(("y", "d_x", "d_weight", "d_bias"), found, truth, strict=True):
            assert ours is not None
            assert true is not None
            bound = 0.02 if dtype != torch.float32 else 1e-4
            if not (ours.to(wide) - true).abs().max() <= bound * (true.abs().max() + (name == "d_bias")) + 1e-6:
                wrong += f"{name} {dtype} {shape} {filters} {kernel} {conv} {pads} {memory}; "
    return wrong


def known_convolutions(name: str) -> str:
    """What is wrong in five draws of the values."""
    torch.manual_seed(0)
    return "".join(_wrong(*KNOWN[name]) for _ in range(5))


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_convolutions(name: str) -> None:
    """torch's own kernels crash here or are wrong (therefore in a process of its own)."""
    assert mw.launch(known_convolutions, ranks=1, args=(name,)) == [""]


def drawn_convolutions() -> str:
    """Small shapes with every setting."""
    torch.manual_seed(0)
    draw, wrong = random.Random(0), ""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for _ in range(400):
            n = draw.choice((1, 2, 3))
            of = (1, 2, 3, 4, 5, 8, 9, 12, 16, 20), (1, 2, 3, 4, 5)
            sizes, kernel = (tuple(draw.choice(some) for _ in range(n)) for some in of)
            stride, dilation = (tuple(draw.choice(some) for _ in range(n)) for some in ((1, 1, 2, 3, 4), (1, 1, 2)))
            pads = tuple((draw.choice((0, 1, 1, 2, 3)), draw.choice((0, 1, 2))) for _ in range(n))
            reaches = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            if any(size + sum(ends) < reach for size, ends, reach in zip(sizes, pads, reaches, strict=True)):
                continue
            shape = draw.choice((1, 2)), draw.choice((2, 3, 16)), *sizes
            wrong += _wrong(dtype, shape, draw.choice((1, 3, 16)), kernel, Conv(stride, dilation, 1), pads)
    return wrong


def test_drawn_convolutions() -> None:
    """torch's own kernels crash or are wrong on one in a hundred."""
    assert mw.launch(drawn_convolutions, ranks=1) == [""]
