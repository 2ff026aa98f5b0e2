"""`torch.func` and dual numbers on mesh tensors: right where nothing is exchanged, else refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import error, whole
from scenario_kit import Errors, sample
from torch import Tensor, nn

import meshwright as mw
from meshwright.errors import UnsupportedError


def _right_or_refused(names: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]) -> Errors:
    """Each either equals plain torch or raises an error that says what it is about; never another value."""
    errors: Errors = {}
    for name, (ours, plain) in names.items():
        try:
            value = whole(ours())
        except UnsupportedError as refusal:
            errors[name] = float("torch.func" not in str(refusal) and "forward AD" not in str(refusal))
            continue
        errors[name] = error(value, plain())
    return errors


def transforms(plan: mw.Plan) -> Errors:
    """`torch.func`: right, or refused by name."""
    torch.manual_seed(6)
    plain = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv3d(4, 2, 3)).double()
    module = mw.parallelize(copy.deepcopy(plain), plan)
    x, v = sample(), sample(3)
    sx, sv = mw.shard(x, plan), mw.shard(v, plan)

    def of(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda t: (model(t) ** 2).mean()

    curve = lambda t: (t.sin() * t).mean(1)  # noqa: E731
    func = torch.func

    def pair(make: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return lambda: make(of(module), sx, sv), lambda: make(of(plain), x, v).detach()

    def curved(make: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return lambda: make(curve, sx, sv), lambda: make(curve, x, v).detach()

    return _right_or_refused(
        {
            "grad": pair(lambda f, t, u: func.grad(f)(t)),
            "vjp": pair(lambda f, t, u: func.vjp(f, t)[1](torch.ones_like(f(t)))[0]),
            "jvp": pair(lambda f, t, u: func.jvp(f, (t,), (u,))[1]),
            "second": pair(lambda f, t, u: func.grad(lambda s: (func.grad(f)(s) ** 2).sum())(t)),
            "vmap": pair(lambda f, t, u: func.vmap(lambda s: f(s[None]))(t)),
            "elementwise grad": curved(lambda f, t, u: func.grad(lambda s: f(s).sum())(t)),
            "elementwise jvp": curved(lambda f, t, u: func.jvp(f, (t,), (u,))[1]),
            "elementwise vmap": curved(lambda f, t, u: func.vmap(f)(t)),
            "elementwise vmap of columns": curved(lambda f, t, u: func.vmap(f, in_dims=3, out_dims=1)(t)),
            "forward mode": curved(_forward_mode),
            "forward mode of the module": pair(_forward_mode),
            "pooling": curved(lambda f, t, u: func.grad(lambda s: (F.avg_pool3d(f(s)[:, None], 2) ** 2).sum())(t)),
            "parameters": pair(_of_parameters(plain, module)),
        }
    )


def _of_parameters(plain: nn.Module, module: nn.Module) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """`torch.func.grad` of `functional_call` for a weight."""

    def run(f: Any, t: Tensor, u: Tensor) -> Tensor:
        model = plain if type(t) is Tensor else module
        loss = lambda w: (torch.func.functional_call(model, {"0.weight": w}, (t,)) ** 2).mean()  # noqa: E731
        return torch.func.grad(loss)(model.get_parameter("0.weight").detach())

    return run


def _forward_mode(f: Callable[[Tensor], Tensor], t: Tensor, u: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = f(torch.autograd.forward_ad.make_dual(t, u))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return tangent.clone()
