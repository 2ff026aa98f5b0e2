"""Tensors between two rules: writes that torch records or not, memory that two share, and gradients asked for late."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import whole
from scenario_kit import Errors, against, gradients, objective, sample
from scenarios_history import Chain, both
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

import meshwright as mw


def flags(plan: mw.Plan) -> Errors:
    """A Python bool is a number, not a wish to write in place."""

    def watch(seen: dict[str, Tensor]) -> Any:
        def at(name: str, value: Tensor) -> Tensor | None:
            if name == "conv":
                (value * True).mul_(3)
                return torch.add(value, True) + (value.ndim == 5)
            return F.relu(value, True) if name == "norm" else None

        return at, lambda loss: loss.backward()

    return both(plan, watch)


def unrecorded(plan: mw.Plan) -> Errors:
    """A write under `no_grad` after others have gone on: hooks and gradients of the tensor are what they were."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> Tensor | None:
            if name == "conv":  # what follows both needs no value of theirs
                held["conv"], held["scaled"] = value, value * 2
                return held["scaled"] + 1
            if name == "end":
                with torch.no_grad():
                    held["conv"].mul_(0)
                    held["scaled"].clamp_(-0.5, 0.5)
                held["conv"].register_hook(lambda g: 2 * g)
                held["scaled"].retain_grad()
            return None

        def finish(loss: Tensor) -> None:
            (seen["asked"],) = torch.autograd.grad(loss, held["conv"], retain_graph=True)
            loss.backward()
            seen["kept"] = held["scaled"].grad  # type: ignore[assignment]

        return at, finish

    return both(plan, watch)


def copied(plan: mw.Plan) -> Errors:
    """What changes nothing is a copy: with gradients of its own, and of memory of its own, recorded or not."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> Tensor | None:
            if name != "conv":
                return None
            sizes = tuple(value.shape[2:])
            results = [
                F.interpolate(value, size=sizes),
                F.interpolate(value, size=sizes, mode="trilinear"),
                F.pad(value, (0,) * 6, mode="replicate"),
            ]
            held.update({str(i): y for i, y in enumerate(results)})
            with torch.no_grad():
                results[0].mul_(3)
                F.pad(value, (0,) * 6, mode="circular").mul_(0)
                F.interpolate(value, size=sizes, mode="nearest-exact").mul_(0)
            return value + sum(results)

        def finish(loss: Tensor) -> None:
            for name, y in held.items():
                (seen[name],) = torch.autograd.grad(loss, y, retain_graph=True)
            loss.backward()

        return at, finish

    return both(plan, watch)


def counted(plan: mw.Plan) -> Errors:
    """Writes in place are seen by what shares the memory: counters, and slices of a detached tensor."""

    def watch(seen: dict[str, Tensor]) -> Any:
        def at(name: str, value: Tensor) -> None:
            if name == "norm":
                before, apart = value._version, value.detach()
                part = apart[:, :, 1:4]
                value.mul_(2)
                F.relu(value, inplace=True)
                seen["slice"], seen["whole"] = part + 0, apart + 0
                seen["writes"] = torch.tensor(float(value._version - before))
                other = apart.clone()
                with torch.no_grad():  # as optimisers write
                    before, part = other._version, other[:, :, 1:4]
                    other.add_(apart, alpha=0.5)
                    other.mul_(0.5)
                seen["slice without graph"] = part + 0
                seen["writes without graph"] = torch.tensor(float(other._version - before))

        return at, lambda loss: loss.backward()

    return both(plan, watch)


def overwritten(plan: mw.Plan) -> Errors:
    """Writes to what a backward needs are refused by it, whichever handle they come by."""
    found: Errors = {}
    for name, write in {
        "view": lambda y: y[:, 1].mul_(2),
        "item": lambda y: y.__setitem__((slice(None), 1), 0.5),
        "split dim": lambda y: y[:, :, 1:3].mul_(2),
        "detached": lambda y: y.detach().mul_(2),
        "unrecorded": lambda y: torch.no_grad()(y.mul_)(2),
    }.items():
        model = mw.parallelize(Chain(), plan)

        def at(layer: str, value: Tensor, write: Any = write) -> Tensor | None:
            if layer != "conv":
                return None
            y = value.exp()
            write(y)
            return y

        y = model(mw.shard(sample(), plan), at)
        try:
            objective(y).backward()
            found[name] = 1.0
        except RuntimeError as error:
            found[name] = 0.0 if "modified by an inplace operation" in str(error) else 1.0
    return found


def replaced(plan: mw.Plan) -> Errors:
    """`.data` given anew is what the next rule takes."""

    def watch(seen: dict[str, Tensor]) -> Any:
        def at(name: str, value: Tensor) -> None:
            if name in ("conv", "norm"):
                value.data = value.data * 2

        return at, lambda loss: loss.backward()

    return both(plan, watch)


def kept_last(plan: mw.Plan) -> Errors:
    """A retained gradient is that after all hooks, and goes along with a write in place, also in double backward."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> None:
            held[name] = value
            value.retain_grad()
            if name == "conv":
                value.register_hook(lambda g: 2 * g)
            elif name == "norm":
                value.mul_(2)
                seen["flag"] = torch.tensor(float(value.retains_grad))

        def finish(loss: Tensor) -> None:
            loss.backward(inputs=list(held.values()), create_graph=True)
            grads = {name: value.grad for name, value in held.items()}
            for value in held.values():
                value.grad = None
            sum((g * g).sum() for g in grads.values() if g is not None).backward()
            seen.update({f"first {name}": g.detach() for name, g in grads.items() if g is not None})
            seen.update({f"second {name}": v.grad for name, v in held.items() if v.grad is not None})

        return at, finish

    return both(plan, watch)


def edges(plan: mw.Plan) -> Errors:
    """Gradient edges and hooks of several tensors, taken before and after others have gone on."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Any] = {}

        def at(name: str, value: Tensor) -> None:
            held[name] = value
            if name == "norm":
                held["edge norm"] = get_gradient_edge(value)
            elif name == "end":
                held["edge conv"], held["edge relu"] = get_gradient_edge(held["conv"]), get_gradient_edge(held["relu"])
                both_of = [held["conv"], held["relu"]]
                register_multi_grad_hook(
                    both_of,
                    lambda grads: seen.update({f"all {i}": g for i, g in enumerate(grads)}),  # type: ignore[misc]
                )

        def finish(loss: Tensor) -> None:
            names = [name for name in held if name.startswith("edge")]
            seen.update(zip(names, torch.autograd.grad(loss, [held[n] for n in names], retain_graph=True), strict=True))
            loss.backward()

        return at, finish

    return both(plan, watch)


def recomputed(plan: mw.Plan) -> Errors:
    """A checkpoint recomputes what it computed, though somebody has looked at the graph of its input meanwhile."""
    found = []
    for split in (True, False):
        model, x = Chain(), sample()
        if split:
            model, x = mw.parallelize(model, plan), mw.shard(x, plan)
        h = model.first(x)
        y = checkpoint(lambda t, m=model: m.last(torch.tanh(m.second(t) + t)), h, use_reentrant=False)
        assert h.grad_fn is not None
        torch.autograd.backward([objective(y), h], [None, torch.ones_like(h)])
        found.append(gradients(model))
    return against(*found)


def taken_twice(plan: mw.Plan) -> Errors:
    """Two mesh tensors around one part of the user: hooks and gradients of one are not those of the other."""
    found = []
    for split in (True, False):
        x = sample().requires_grad_()
        shape = tuple(x.shape)
        held = mw.shard(x.detach(), plan).to_local().requires_grad_() if split else x
        part = held * 2
        first, second = ((mw.from_local(part, plan, shape) if split else part.view_as(part)) for _ in range(2))
        first.register_hook(lambda g: 2 * g)
        loss = objective(first.sin()) + objective(second * 3)
        grads = torch.autograd.grad(loss, [first, second], retain_graph=True)
        loss.backward()
        assert held.grad is not None
        own = mw.from_local(held.grad, plan, shape) if split else held.grad
        found.append({"first": whole(grads[0]), "second": whole(grads[1]), "part": whole(own)})
    return against(*found)


def joined(plan: mw.Plan) -> Errors:
    """Channels joined in halves, channels_last: gradients of the pieces, and theirs, are the same numbers; dense."""
    found: list[list[Tensor]] = []
    for split in (True, False):
        x = sample(shape=(2, 3, 5, 6, 4)).bfloat16().to(memory_format=torch.channels_last_3d)
        scale = sample(7, shape=(2, 7, 10, 12, 8)).bfloat16().to(memory_format=torch.channels_last_3d)
        if split:
            x, scale = mw.shard(x, plan), mw.shard(scale, plan)
        x.requires_grad_()
        pieces = [F.interpolate(piece, scale_factor=2) for piece in (x, x[:, :2] * 2, -x[:, 1:])]
        y = torch.cat(pieces, dim=1)
        formats: list[bool] = []
        if split:
            last = torch.channels_last_3d
            pieces[1].register_hook(lambda g: formats.append(g.to_local().is_contiguous(memory_format=last)))  # noqa: B023
            assert y.grad_fn is not None
            assert type(y.grad_fn.next_functions[0][0]).__name__ == "_JoinBackward"
        ones = torch.ones_like(y)
        grads = torch.autograd.grad(y * y * scale, pieces, ones, create_graph=True)
        assert formats == [True] * split
        again = torch.autograd.grad(sum(g * g for g in grads[1:]), pieces, torch.ones_like(grads[1]))
        found.append([whole(t) for t in (y, *grads, *again)])
    return {str(i): 0.0 if torch.equal(ours, true) else 1.0 for i, (ours, true) in enumerate(zip(*found, strict=True))}


def let_go(plan: mw.Plan) -> Errors:
    """A retained gradient outlives the graph: after the tensor has left it, was written, or was given other data."""

    def watch(seen: dict[str, Tensor]) -> Any:
        held: dict[str, Tensor] = {}

        def at(name: str, value: Tensor) -> Tensor | None:
            held[name] = value
            if name == "conv":  # what follows needs no values of theirs
                held["twice"], held["half"] = value * 2, value * 0.5
                return held["twice"] + held["half"] + value
            if name == "end":
                for kept in ("conv", "twice", "half", "relu"):
                    held[kept].retain_grad()
            return None

        def finish(loss: Tensor) -> None:
            loss.backward()
            assert held["half"].grad is held["half"].grad
            held["conv"].detach_()
            torch.detach_(held["twice"]).requires_grad_()
            held["half"].add_(1)
            held["relu"].data = held["relu"].detach() * 2
            held["twice"].square().sum().backward()
            seen.update({k: held[k].grad for k in ("conv", "twice", "half", "relu")})  # type: ignore[misc]

        return at, finish

    return both(plan, watch)


def looked_at(plan: mw.Plan) -> Errors:
    """Hooks of the node itself, hung on before others go on, see all of the gradient, and change it."""

    def watch(seen: dict[str, Tensor]) -> Any:
        def at(name: str, value: Tensor) -> None:
            if name in ("conv", "relu"):
                assert value.grad_fn is not None
                value.grad_fn.register_prehook(lambda grads: (grads[0] / grads[0].norm(),))
                value.grad_fn.register_hook(lambda _, grads, name=name: seen.update({name: grads[0].sum() + grads[0]}))
            if name == "norm":
                value.register_hook(lambda g: (g.mul_(2), None)[1])

        return at, lambda loss: loss.backward()

    return both(plan, watch)


def turned(plan: mw.Plan) -> Errors:
    """Dims exchanged in place, unrecorded: what follows sees them so."""
    found = []
    for split in (True, False):
        model, x = Chain(), sample(shape=(2, 3, 8, 8, 8))
        if split:
            model, x = mw.parallelize(model, plan), mw.shard(x, plan)
        h = model.first(x)
        with torch.no_grad():
            h.transpose_(0, 1)
        found.append({"after": whole(F.relu(h) * 2)})
    return against(*found)
