"""Tensors between two rules, which go on from the parts themselves: whatever a user does with one sees it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import whole
from scenario_kit import Errors, against, gradients, objective, sample
from torch import Tensor, nn

import meshwright as mw


class Chain(nn.Module):
    """Four rules one behind the other, with elementwise work between; `at` is done to each result on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.norm = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.second, self.last = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 2, 1)
        self.double()

    def forward(self, x: Tensor, at: Callable[[str, Tensor], Any]) -> Tensor:
        """Whatever `at` gives back for a name goes on in its place."""
        h = self.first(x)
        h = self._or(at("conv", h), h)
        n = self.norm(h)
        n = self._or(at("norm", n), n)
        r = F.leaky_relu(n, 0.2)
        r = self._or(at("relu", r), r)
        y = self.last(torch.tanh(self.second(r) + r))
        at("end", y)
        return y

    @staticmethod
    def _or(given: Any, held: Tensor) -> Tensor:
        return held if given is None else given


Watch = Callable[[dict[str, Tensor]], tuple[Callable[[str, Tensor], Any], Callable[[Tensor], None]]]


def both(plan: mw.Plan, watch: Watch) -> Errors:
    """Module and device: `watch` gets a dict to note tensors in, and returns `at` and what runs on the loss."""
    found = []
    for split in (True, False):
        model, x = Chain(), sample()
        if split:
            model = mw.parallelize(model, plan)
        x = (mw.shard(x, plan) if split else x).requires_grad_()
        seen: dict[str, Tensor] = {}
        at, finish = watch(seen)
        y = model(x, at)
        finish(objective(y))
        found.append({name: whole(value) for name, value in seen.items()} | gradients(model))
    return against(*found)


def hooks(plan: mw.Plan) -> Errors:
    """On every tensor, as it is made and after the next rule has gone on from it; one of them changes the gradient."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> None:
            held[name] = value
            value.register_hook(lambda g: seen.update({f"early {name}": g}))
            if name == "end":
                for other, tensor in held.items():
                    tensor.register_hook(lambda g, other=other: seen.update({f"late {other}": g}))
                held["norm"].register_hook(lambda g: 2 * g)

        return at, lambda loss: loss.backward()

    return both(plan, watch)


def retained(plan: mw.Plan) -> Errors:
    """`.grad` kept on the way, asked for before and after, over two backwards; one tensor also meets no rule."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> None:
            held[name] = value
            if name == "norm":
                value.retain_grad()
            elif name == "end":
                held["conv"].retain_grad()
                held["relu"].retain_grad()

        def finish(loss: Tensor) -> None:
            loss = loss + (held["relu"].abs() ** 3).mean()
            loss.backward(retain_graph=True)
            loss.backward()
            seen.update({name: held[name].grad for name in ("conv", "norm", "relu")})  # type: ignore[misc]

        return at, finish

    return both(plan, watch)


def asked_for(plan: mw.Plan) -> Errors:
    """Gradients for tensors on the way, also differentiated again, and as the only inputs of a backward."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def finish(loss: Tensor) -> None:
            loss = loss + held["norm"].square().sum()
            names = ("conv", "norm", "relu")
            grads = torch.autograd.grad(loss, [held[name] for name in names], create_graph=True)
            seen.update(zip(names, grads, strict=True))
            sum((g * g).sum() for g in grads).backward(inputs=[held["conv"]], retain_graph=True)
            seen["inputs"] = held["conv"].grad  # type: ignore[assignment]
            loss.backward()

        return held.__setitem__, finish

    return both(plan, watch)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


def other_ways(plan: mw.Plan) -> Errors:
    """A user's own function, views, writes to them and in place, and nodes of the graph, between two rules."""

    def watch(seen: dict[str, Tensor]) -> Any:
        views: list[Tensor] = []

        def at(name: str, value: Tensor) -> Tensor | None:
            if name == "conv":
                views.append(value[:, :2])  # a view that sees the write that follows
                value.add_(1).mul_(0.5)
                return _Cube.apply(value)
            if name == "norm":
                value += 0.25
                value[:, 1] = 0.5
                value[:, :, 1:3] *= 1.5  # not every rank has a part of it
                node = value.grad_fn
                assert node is not None
                node.register_prehook(lambda grads: seen.update({"node": grads[0]}))
                return value
            if name == "relu":
                before = value
                value *= 2
                out = F.relu(value, inplace=True)
                assert out is value is before
                return value + value.detach().clone()
            return None

        def finish(loss: Tensor) -> None:
            (loss + views[0].square().mean()).backward()

        return at, finish

    return both(plan, watch)


def left(plan: mw.Plan) -> Errors:
    """A tensor that leaves its graph in place brings no gradient to what made it."""

    def watch(seen: dict[str, Tensor]) -> Any:
        def at(name: str, value: Tensor) -> None:
            if name == "norm":
                value.detach_()

        return at, lambda loss: loss.backward()

    return both(plan, watch)
