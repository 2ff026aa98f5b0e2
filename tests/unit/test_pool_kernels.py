"""Average pooling of channels_last volumes: torch's values and gradients, twice, in the format that came in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel.pool_kernels import Boxes, _is_separable, average

LAST = torch.channels_last_3d


@st.composite
def poolings(draw: st.DrawFn) -> tuple[tuple[int, ...], Boxes]:
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=3, max_size=3)))
    stride = tuple(draw(st.lists(st.integers(1, 5), min_size=3, max_size=3)))
    pads = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    space = tuple(draw(st.integers(k, 9)) for k in kernel)
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(2, 3))
    return (batch, channels, *space), Boxes(kernel, stride, pads, draw(st.booleans()), math.prod(kernel))


@settings(max_examples=150, deadline=None)
@given(poolings())
def test_same_as_torch(drawn: tuple[tuple[int, ...], Boxes]) -> None:
    shape, boxes = drawn
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=LAST).requires_grad_()
    if not _is_separable(x, boxes):  # a batch of one voxel has both formats
        return
    y = average(x, boxes)
    want = F.avg_pool3d(x, *boxes[:4], True, boxes.divisor)
    torch.testing.assert_close(y, want)
    assert y.is_contiguous(memory_format=LAST)
    grad = torch.randn_like(want)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, grad) for out in (y, want))
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=LAST)


def test_gradient_of_the_gradient() -> None:
    x = torch.randn(1, 2, 5, 6, 7, dtype=torch.float64).to(memory_format=LAST).requires_grad_()
    boxes = Boxes((3, 2, 3), (2, 2, 1), (1, 0, 1), False, 18)
    assert _is_separable(x, boxes)
    assert torch.autograd.gradgradcheck(lambda t: average(t, boxes) ** 2, x)


def test_other_inputs_take_torchs_kernel() -> None:
    """Default format, half precision, a divisor of one's own, two dims, and long kernels."""
    boxes = Boxes((2, 2, 2), (2, 2, 2), (0, 0, 0), False, 8)
    x = torch.randn(1, 3, 8, 8, 8)
    assert not _is_separable(x, boxes)
    assert _is_separable(x.to(memory_format=LAST), boxes)
    assert not _is_separable(x.to(memory_format=LAST).bfloat16(), boxes)
    assert not _is_separable(x.to(memory_format=LAST), boxes._replace(divisor=5))
    assert not _is_separable(x.to(memory_format=LAST), boxes._replace(kernel=(8, 1, 1), divisor=8))
    torch.testing.assert_close(average(x, boxes._replace(divisor=5)), F.avg_pool3d(x, 2, divisor_override=5))
    line = torch.randn(2, 3, 9)
    torch.testing.assert_close(average(line, Boxes((3,), (2,), (1,), False, 3)), F.avg_pool1d(line, 3, 2, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("divisor", [8, 5])
def test_every_kernel_leaves_the_same_graph(dims: int, divisor: int) -> None:
    """The gradient of a linear operator does not lead back to its input, whichever kernel a rank takes: ranks with
    another graph would meet in other layers during a second backward."""
    x = torch.randn(1, 3, *(6,) * dims, dtype=torch.float64)
    boxes = Boxes((2,) * dims, (2,) * dims, (0,) * dims, False, divisor)
    for given_x in (x, x.to(memory_format=LAST) if dims == 3 else x.clone(), x[..., ::2]):
        leaf = given_x.detach().requires_grad_()
        y = average(leaf, boxes)
        plain = POOL[dims](leaf, *boxes[:4], True)
        torch.testing.assert_close(y, plain * (2**dims / divisor))
        weights = torch.randn_like(y).requires_grad_()
        for weight, leads_back in ((weights.detach(), False), (weights, True)):
            (gradient,) = torch.autograd.grad((y * weight).sum(), leaf, create_graph=True, retain_graph=True)
            assert gradient.requires_grad == leads_back
            (want,) = torch.autograd.grad((plain * weight).sum() * (2**dims / divisor), leaf, retain_graph=True)
            torch.testing.assert_close(gradient.detach(), want)
            found = [] if not leads_back else torch.autograd.grad(gradient.sum(), [leaf, weights], allow_unused=True)
            assert not found or (found[0] is None and found[1] is not None)


POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
