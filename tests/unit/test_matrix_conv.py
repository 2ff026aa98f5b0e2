"""Convolutions as matrix products against torch's own, and which convolutions they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel import matrix_conv
from meshwright.parallel.kernels import _planned, as_matrix, conv_backward, conv_forward, memory_format
from meshwright.parallel.signature import Conv

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}


@contextmanager
def products(others: float) -> Iterator[None]:
    """Gradients of weights are matrix products, whatever their size; so are the `others`, up to that share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_conv, "LARGE_WEIGHT", 0)
        patch.setattr(matrix_conv, "LARGE_IMAGE_WEIGHT", 0)
        patch.setattr(matrix_conv, "IMAGE_POSITIONS", torch.inf)
        patch.setattr(matrix_conv, "FEW_POSITIONS", torch.inf)
        patch.setattr(matrix_conv, "FEWEST_POSITIONS", others)
        _planned.cache_clear()  # what was decided with other constants
        yield
    _planned.cache_clear()


@pytest.fixture
def always() -> Iterator[None]:
    """Every convolution without groups is a matrix product."""
    with products(torch.inf):
        yield


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Conv, list[int], list[int], list[tuple[int, int]], tuple[bool, bool], int]:
    """(convolution, input sizes, kernel, pads that may differ, channels last for input and weight, samples)."""
    dims = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    conv = Conv(tuple(draw(st.integers(1, 3)) for _ in kernel), tuple(draw(st.integers(1, 2)) for _ in kernel), 1)
    pads = [(draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in kernel]
    reaches = [d * (k - 1) + 1 for k, d in zip(kernel, conv.dilation, strict=True)]
    sizes = [max(1, r - sum(p)) + draw(st.integers(0, 4)) for r, p in zip(reaches, pads, strict=True)]
    return conv, sizes, kernel, pads, (draw(st.booleans()), draw(st.booleans())), draw(st.integers(1, 2))


@settings(max_examples=150, deadline=None)
@given(drawn(), st.booleans(), st.sampled_from([0, torch.inf]))
def test_every_geometry(
    case: tuple[Conv, list[int], list[int], list[tuple[int, int]], tuple[bool, bool], int], bias: bool, others: float
) -> None:
    """Output and gradients in fp64, dense and in an order that torch gives too: products all, or of weights alone."""
    conv, sizes, kernel, pads, last, samples = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, *sizes, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, generator=generator, dtype=torch.float64)
    x, weight = (
        t.to(memory_format=LAST[len(kernel)]) if there else t for t, there in zip((x, weight), last, strict=True)
    )
    b = torch.randn(4, generator=generator, dtype=torch.float64) if bias else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, b) if t is not None]
    ends = [value for pair in reversed(pads) for value in pair]
    truth = CONV[len(kernel)](
        F.pad(leaves[0], ends), leaves[1], leaves[2] if bias else None, conv.stride, 0, conv.dilation
    )
    with products(others):
        for of in get_args(matrix_conv.Of):
            few = of == "weight" or x.ndim == 3 or (of == "input" and x.ndim == 4 and not x.is_contiguous())
            assert as_matrix(x, weight, conv, truth.shape[2:], of) == (few or others > 0)
        y = conv_forward(x, weight, b, conv, pads, truth.shape[2:])
        torch.testing.assert_close(y, truth.detach())
        grad = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
        found = [t for t in conv_backward(grad, x, weight, conv, pads, (True, True, bias)) if t is not None]
        nothing = conv_backward(grad, x, weight, conv, pads, (False, False, False))
    for ours, want in zip(found, torch.autograd.grad(truth, leaves, grad), strict=True):
        torch.testing.assert_close(ours, want)
    assert nothing == (None, None, None)
    if not others:  # torch may leave a view of a larger gradient
        return
    formats = (torch.contiguous_format, LAST[len(kernel)])
    assert all(any(t.is_contiguous(memory_format=f) for f in formats) for t in (y, found[0]))


def test_fewer_outputs_than_there_could_be(always: None) -> None:
    """The first positions, where more are asked of other ranks."""
    x, weight = torch.randn(1, 2, 9, 4), torch.randn(3, 2, 3, 3)
    conv, pads = Conv((2, 1), (1, 1), 1), [(1, 1), (1, 1)]
    whole = F.conv2d(x, weight, None, (2, 1), 1)
    torch.testing.assert_close(conv_forward(x, weight, None, conv, pads, (3, 4)), whole[:, :, :3])


@pytest.mark.parametrize("last", [False, True])
def test_halves_round_once(always: None, last: bool) -> None:
    """The shares of an input's gradient are added up in fp32."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() is False:
        pytest.skip("this processor widens bf16 convolutions instead (no AVX512)")
    torch.manual_seed(0)
    x, weight = torch.randn(1, 32, 4, 4).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    grad, conv, pads = torch.randn(1, 32, 4, 4).bfloat16(), Conv((1, 1), (1, 1), 1), [(1, 1), (1, 1)]
    found = conv_backward(grad, x, weight, conv, pads, (True, True, False))[:2]
    truth = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    for ours, want in zip(found, truth, strict=False):
        assert ours is not None
        assert (ours.double() - want).abs().max() <= 2**-8 * want.abs().max()
    assert memory_format(found[0]) is (torch.channels_last if last else torch.contiguous_format)


def test_as_torch_lays_them_out(always: None) -> None:
    """A contiguous kernel of one tap is channels_last, too, and decides nothing; nor does autocast around backward."""
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(6, 8, 1, 1)
    conv, pads = Conv((1, 1), (1, 1), 1), [(0, 0), (0, 0)]
    grad = torch.randn(1, 6, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_forward(x, weight, None, conv, pads, (4, 4))
        d_x, d_weight, _ = conv_backward(grad, x, weight, conv, pads, (True, True, False))
    assert d_x is not None
    assert d_weight is not None
    assert y.is_contiguous()
    assert d_x.is_contiguous()
    assert {t.dtype for t in (y, d_x, d_weight)} == {torch.float32}
    torch.testing.assert_close(y, F.conv2d(x, weight))


def test_which_convolutions() -> None:
    """Large weights at few positions, without groups, on the CPU."""
    weight, conv = torch.empty(512, 512, 3, 3), Conv((1, 1), (1, 1), 1)
    x = torch.empty(1, 512, 8, 16)
    assert as_matrix(x, weight, conv, (16, 32), "weight")
    assert not as_matrix(x, weight, conv, (16, 33), "weight")
    assert not as_matrix(x, weight[:, :256, :, :1], conv, (8, 16), "weight")
    assert not as_matrix(x, weight, Conv((1, 1), (1, 1), 2), (8, 16), "weight")
    assert not as_matrix(x.half(), weight.half(), conv, (8, 16), "weight")
    assert not as_matrix(x.to("meta"), weight, conv, (8, 16), "weight")
    last = x.contiguous(memory_format=torch.channels_last)
    for of in ("output", "input"):
        assert not as_matrix(x, weight, conv, (8, 16), of)
        assert as_matrix(x, weight, conv, (4, 8), of)
        assert as_matrix(last, weight, conv, (8, 16), of)
        assert not as_matrix(last, weight, conv, (8, 17), of)
        assert as_matrix(last.bfloat16(), weight.bfloat16(), conv, (8, 16), of) == (of == "input")
    line = Conv((1,), (1,), 1)  # near a cut of images: torch copies lines and their weights
    for of in get_args(matrix_conv.Of):
        assert as_matrix(x[:, :, 0], weight[:, :, 0], line, (128,), of)
        assert not as_matrix(x[:, :, 0], weight[:, :, 0], line, (129,), of)


def test_which_outputs_of_volumes() -> None:
    """In fp32 with channels together torch leaves oneDNN."""
    weight, conv = torch.empty(256, 256, 3, 3, 3), Conv((1, 1, 1), (1, 1, 1), 1)
    x = torch.empty(1, 256, 4, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert as_matrix(last, weight, conv, (4, 4, 4), "output")
    assert not as_matrix(last, weight, conv, (4, 4, 4), "input")
    assert not as_matrix(x, weight, conv, (4, 4, 4), "output")
    assert not as_matrix(last.bfloat16(), weight.bfloat16(), conv, (4, 4, 4), "output")
