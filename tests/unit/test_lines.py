"""What a line of a neighbour adds to a line of outputs, against torch's convolution of that line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel.rules.lines import are_lines, line_conv
from meshwright.parallel.signature import Conv, signature


@settings(max_examples=200, deadline=None)
@given(
    inputs=st.integers(1, 12),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    pads=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    fewer=st.integers(0, 2),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dim=st.sampled_from([2, 3]),
    last=st.booleans(),
)
def test_every_geometry(
    inputs: int,
    kernel: int,
    stride: int,
    dilation: int,
    pads: tuple[int, int],
    fewer: int,
    channels: tuple[int, int],
    dim: int,
    last: bool,
) -> None:
    """Outputs and both gradients, added to what is there; `fewer` outputs than there could be."""
    outputs = (inputs + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1 - fewer
    if outputs < 1:
        return
    torch.manual_seed(0)
    order = torch.channels_last if last else torch.contiguous_format
    sizes, tap = ((3, kernel), (2, outputs), (2, inputs)), 1
    (k, out, given_), other = (size if dim == 2 else size[::-1] for size in sizes), 5 - dim
    weight, x = torch.randn(*channels, *k).double(), torch.randn(1, channels[1], *given_).double()
    weight, x = weight.contiguous(memory_format=order), x.contiguous(memory_format=order)
    y, d_weight = torch.randn(1, channels[0], *out).double().contiguous(memory_format=order), torch.randn_like(weight)
    conv = Conv((stride, stride), (dilation, dilation), 1)
    line = line_conv(dim, tap, conv, pads[0], inputs, outputs, weight.shape[other])

    row, taps = x.select(dim, 1).clone().requires_grad_(), weight.select(dim, tap).clone().requires_grad_()
    wanted = F.conv1d(F.pad(row, pads), taps, stride=stride, dilation=dilation)[..., :outputs]
    grad = torch.randn_like(wanted)
    d_row, d_taps = torch.autograd.grad(wanted, (row, taps), grad)

    before, d_before = y.clone(), d_weight.clone()
    line.add_outputs(y.select(dim, 0), x.select(dim, 1), weight)
    before.select(dim, 0).add_(wanted.detach())
    torch.testing.assert_close(y, before)
    torch.testing.assert_close(line.input_gradient(grad, inputs, weight), d_row)
    line.add_weight_gradient(grad, x.select(dim, 1), d_weight)
    d_before.select(dim, tap).add_(d_taps)
    torch.testing.assert_close(d_weight, d_before)


def test_which_are_lines() -> None:
    """Those of one image in fp32 or fp64, without groups."""
    image, conv = torch.empty(1, 4, 8, 8), Conv((1, 1), (1, 1), 1)
    assert are_lines(signature(image), conv)
    assert are_lines(signature(image.double()), conv)
    assert not are_lines(signature(image.bfloat16()), conv)
    assert not are_lines(signature(torch.empty(2, 4, 8, 8)), conv)
    assert not are_lines(signature(torch.empty(1, 4, 8, 8, 8)), Conv((1, 1, 1), (1, 1, 1), 1))
    assert not are_lines(signature(image), Conv((1, 1), (1, 1), 2))
