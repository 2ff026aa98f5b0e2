"""The sums of a norm's backward, which take torch's batch-norm kernel: right in every memory order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import meshwright as mw
from meshwright.parallel.rules.standardize import _gradient_sums


def laid_out(shape: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """Random numbers that lie dense in memory, dims in `order` from the slowest."""
    values = torch.randn([shape[dim] for dim in order], dtype=torch.float64)
    return values.permute([order.index(dim) for dim in range(len(shape))])


@pytest.mark.parametrize("shape", [(3, 2), (1, 4, 2, 1), (2, 3, 1, 2), (2, 2, 3), (1, 2, 2, 1, 3)])
def test_gradient_and_input_may_lie_differently(shape: tuple[int, ...]) -> None:
    """torch 2.13.0 itself reads one of the two in the other's order."""
    torch.manual_seed(0)
    orders = list(itertools.permutations(range(len(shape))))
    dims = (0, *range(2, len(shape)))
    for first, second in itertools.product(orders, orders if len(shape) < 5 else orders[::17]):
        g, x = laid_out(shape, first), laid_out(shape, second)
        total, product = _gradient_sums(g, x, dims)
        torch.testing.assert_close(total, g.sum(dims, keepdim=True))
        torch.testing.assert_close(product, (g * x).sum(dims, keepdim=True))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_gradients_come_back_in_the_order_of_the_result(order: tuple[int, ...]) -> None:
    """Batch norm in eval mode is torch's own, which is wrong where the gradient lies otherwise than its result."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4).double().eval()
    torch.nn.init.uniform_(norm.weight)
    slope = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(1, 4, 1, 1)
    x = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    plan = mw.Plan.uniform()
    split = mw.shard(x, plan).requires_grad_()
    y = mw.parallelize(norm, plan)(split).permute(order)
    g = torch.randn(tuple(y.shape), dtype=torch.float64)
    (y * g).sum().backward()
    back = g.permute([order.index(dim) for dim in range(4)])
    assert split.grad is not None
    torch.testing.assert_close(split.grad.full_tensor(), back * slope)
