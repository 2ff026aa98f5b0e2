"""Batch norm of half precision by torch's kernels with given statistics, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshwright.parallel import norm_kernels
from meshwright.parallel.small import tensor

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, relative
SHAPES = [(2, 5, 7), (3, 4, 6, 5), (1, 6, 4, 5, 6), (2, 3, 1, 1, 2)]


def tensor_sums(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total, product = (tensor(t) for t in norm_kernels.gradient_sums(*args))
    return total, product


def drawn(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> torch.Tensor:
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[len(shape)]) if last and len(shape) in formats else x


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lasts", [(False, False), (True, True), (True, False), (False, True)])
def test_against_fp64(dtype: torch.dtype, shape: tuple[int, ...], lasts: tuple[bool, bool]) -> None:
    """Every function, also where the gradient lies in another memory order than the input."""
    torch.manual_seed(0)
    x, grad = drawn(shape, dtype, lasts[0]), drawn(shape, dtype, lasts[1])
    dims, view = [0, *range(2, len(shape))], [1, -1, *(1 for _ in shape[2:])]
    assert norm_kernels.is_per_channel(x, dims)
    wide, g = x.double(), grad.double()
    mean, variance = (tensor(t) for t in norm_kernels.moments(x)[0])
    torch.testing.assert_close(mean, wide.mean(dims), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance, wide.var(dims, correction=0), rtol=1e-4, atol=1e-4)
    near, scale, slope, level = torch.randn(4, shape[1])
    spread = torch.rand(shape[1])
    normal = (wide - near.double().view(view)) / (spread.double().view(view) + 0.1).sqrt()

    def per(t: torch.Tensor) -> torch.Tensor:
        return t.double().view(view)

    total, product = tensor_sums(grad, x, near, spread, 0.1)
    torch.testing.assert_close(total.double(), g.sum(dims), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(product.double(), (g * normal).sum(dims), rtol=1e-4, atol=1e-2)
    d_x = norm_kernels.input_gradient(grad, x, scale, slope, level)
    want = g * per(scale) + wide * per(slope) + per(level)
    assert d_x.stride() == x.stride()
    assert ((d_x.double() - want).abs() <= EPS[dtype] * want.abs() + 1e-4).all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 64, 128, 128), (2, 2, 40, 128, 128), (33, 2, 32, 1024)])
def test_large_parts_keep_their_digits(last: bool, shape: tuple[int, ...]) -> None:
    """A million elements a channel, far from zero: sums of torch's kernels alone lose the mean's third digit."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 30).to(torch.bfloat16)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    dims, wide, count = [0, *range(2, x.ndim)], x.double(), x.numel() // 2
    mean, variance = (tensor(t) for t in norm_kernels.moments(x)[0])
    torch.testing.assert_close(mean, wide.mean(dims), rtol=2e-6, atol=0)
    torch.testing.assert_close(variance, wide.var(dims, correction=0), rtol=1e-4, atol=0)
    total, product = tensor_sums(torch.ones_like(x), x, torch.tensor([29.0, 30.0]), torch.ones(2), 0.0)
    assert total.tolist() == [count, count]
    torch.testing.assert_close(
        product, (wide - torch.tensor([29.0, 30.0]).view([1, 2] + [1] * (x.ndim - 2))).sum(dims), rtol=1e-4, atol=10
    )


@pytest.mark.parametrize("last", [False, True])
def test_whole_volumes_in_fp32(last: bool) -> None:
    """Sixteen million values a channel: torch's kernel alone is 2.8 % off in channels_last."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 256, 256, 256).expand(1, 2, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    mean, variance = (tensor(t) for t in norm_kernels.moments(x)[0])
    exact = x[0, 0].double()
    torch.testing.assert_close(mean, exact.mean().expand(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(correction=0).expand(2), rtol=1e-5, atol=0)
    total, product = tensor_sums(x.abs(), x, torch.zeros(2), torch.ones(2), 0.0)
    bound = 1e-5 if last else 1e-3  # torch's sums channel by channel are good for three digits here
    torch.testing.assert_close(total, exact.abs().sum().expand(2), rtol=bound, atol=0)
    torch.testing.assert_close(product, (exact.abs() * exact).sum().expand(2), rtol=0, atol=bound * 2**24)


def test_gradients_that_cancel() -> None:
    """The parts of an input's gradient may overflow or hide the sum where each is rounded."""
    x, grad = torch.zeros(1, 1, 2, 2, dtype=torch.float16), torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16)
    per_channel = (torch.tensor([value]) for value in (2.0, 0.0, -1.2e5 + 64))
    assert (norm_kernels.input_gradient(grad, x, *per_channel) == 64).all()


def test_where_they_apply() -> None:
    """Per channel; of one sample without its dim, where it is dense."""
    x = torch.empty(1, 4, 6, 5, 3, dtype=torch.bfloat16)
    assert norm_kernels.is_per_channel(x, (2, 3, 4))
    assert not norm_kernels.is_per_channel(x.expand(2, -1, -1, -1, -1), (2, 3, 4))
    assert not norm_kernels.is_per_channel(x[:, :, ::2], (2, 3, 4))
    assert not norm_kernels.is_per_channel(x, (1, 2, 3, 4))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_far_from_zero_are_told(dtype: torch.dtype, last: bool) -> None:
    """What is computed of the values themselves would lose digits; halves have few."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 50).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for offset in (0, 4, 20):  # around zero, off, and far off in sum: 24 standard deviations
        x[:, 1] += offset
        found, is_centred = norm_kernels.moments(x)
        assert is_centred
        mean, variance = (tensor(t) for t in found)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=2e-7, atol=1e-5)
        torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0), rtol=2e-5, atol=0)
    x[:, 1] += 20
    assert norm_kernels.moments(x)[1] == (dtype == torch.bfloat16)
    assert norm_kernels.moments(x[:, :, :0])[0].tolist() == [[0, 0, 0]] * 2
