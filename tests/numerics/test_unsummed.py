"""Gradients that are not summed over the ranks yet, written to in every usual way: the values of one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.tensor import MESH_TYPES

PLAN = mw.Plan.uniform(height=2)


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double()


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).sum()


def _grad(model: nn.Sequential, x: Tensor) -> Tensor:
    return torch.autograd.grad(_loss(model, x), model[0].weight)[0]


def scaled(model: nn.Sequential, x: Tensor) -> Tensor:
    return _grad(model, x).mul_(3)


def clamped(model: nn.Sequential, x: Tensor) -> Tensor:
    return _grad(model, x).clamp_(-0.1, 0.1)


def shifted(model: nn.Sequential, x: Tensor) -> Tensor:
    return (_grad(model, x) + 1).add_(1)


def clipped_without_sync(model: nn.Sequential, x: Tensor) -> Tensor:
    if isinstance(model[0].weight, MESH_TYPES):
        with mw.no_sync(model):
            _loss(model, x).backward()
    else:
        _loss(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return model[0].weight.grad


def stepped_by_hand(model: nn.Sequential, x: Tensor) -> Tensor:
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(_loss(model, x), parameters), strict=True):
        p.data.add_(g, alpha=-0.01)
    return model(x)


def after_a_failure(model: nn.Sequential, x: Tensor) -> Tensor:
    def fail(grad: Tensor) -> Tensor:
        raise ValueError("as asked")

    handle = model[1].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(ValueError, match="as asked"):
        _loss(model, x).backward()
    handle.remove()
    model.zero_grad()
    _loss(model, x).backward()
    return model[0].weight.grad


def converted(model: nn.Sequential, x: Tensor) -> Tensor:
    _loss(model.float(), x.float()).backward()
    return model[0].weight.grad


USES = [scaled, clamped, shifted, clipped_without_sync, stepped_by_hand, after_a_failure, converted]


def _worst(use: Callable[[nn.Sequential, Tensor], Tensor]) -> float:
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = use(_net(), x)
    ours = use(mw.parallelize(_net(), PLAN), mw.shard(x, PLAN))
    return float((ours.full_tensor() - truth).abs().max())


def errors() -> dict[str, float]:
    return {use.__name__: _worst(use) for use in USES}


def refusals() -> tuple[bool, bool]:
    """A write that would be lost is refused; a change between forward and backward is noticed."""
    x = mw.shard(torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), PLAN)
    with pytest.raises(mw.errors.UnsupportedError, match="view that had to be copied"):
        x.diagonal(dim1=2, dim2=3).mul_(2)
    model = mw.parallelize(_net(), PLAN)
    hidden = model[0](x) * 1
    y = model[2](hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
    return True, True


def test_unsummed_gradients_have_the_value_of_one_device() -> None:
    found = mw.launch(errors, ranks=2)[0]
    bounds = {name: 1e-5 if name == "converted" else 1e-10 for name in found}
    assert not {name: error for name, error in found.items() if error > bounds[name]}


def test_lost_writes_are_refused() -> None:
    assert mw.launch(refusals, ranks=2) == [(True, True)] * 2
