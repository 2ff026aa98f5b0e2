"""Second gradients in use: penalties in training, Hessians, inner steps, checkpoints, hooks, functional transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import scenarios_transforms as transforms
import torch
import torch.nn.functional as F
from harness import error, whole
from scenario_kit import Errors, Scenario, against, gradients, objective, sample, state
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.parallel.exchange import window
from meshwright.parallel.parts import from_local

SMALL = (2, 3, 9, 10, 8)


class Critic(nn.Module):
    """Convolutions of every kind of cut, norms, pooling and a fully connected end; smooth, so that all is curved."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm3d, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.SiLU())
        self.body = nn.Sequential(
            nn.Conv3d(4, 4, 4, stride=2, padding=1), norm(4), nn.GELU(), nn.Conv3d(4, 6, 5, padding=4, dilation=2)
        )
        self.up = nn.ConvTranspose3d(6, 3, 3, stride=2, padding=1)
        self.last = nn.Linear(3, 2)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = checkpoint(self.body, h, use_reentrant=False) if self.recompute else self.body(h)
        h = F.interpolate(torch.tanh(self.up(h)), scale_factor=1.5, mode="nearest")
        h = F.avg_pool3d(h, 3, 2, 1)
        return self.last(F.adaptive_max_pool3d(h, 2).mean((2, 3, 4)) + h.mean((2, 3, 4)))


def critic(seed: int = 5, **options: Any) -> Critic:
    torch.manual_seed(seed)
    return Critic(**options).double()


def both(plan: mw.Plan, plain: nn.Module) -> tuple[tuple[nn.Module, Callable[[Tensor], Tensor]], ...]:
    """The module parallelized and as it is, each with what makes its input."""
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    return (module, lambda x: mw.shard(x, plan)), (plain, lambda x: x)


def slope_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """Gulrajani et al. (2017), equation 3: the norm of each sample's gradient is drawn to 1."""
    x.requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def few_rows(plan: mw.Plan) -> Errors:
    """Fewer queries and points than ranks, and a little more than torch's limit: all ranks have the same graph."""
    found: list[dict[str, Tensor]] = []
    for split in (True, False):
        for pair, rows in ((lambda q, k: F.scaled_dot_product_attention(q, k, k + 1), 3), (torch.cdist, 30)):
            q, k = sample(1, shape=(2, rows, 3)), sample(3, shape=(2, 5, 3)) + 3
            q = (mw.shard(q, plan, layout="NDH") if split else q).requires_grad_()
            (slope,) = torch.autograd.grad((pair(q, k) ** 2).sum(), q, create_graph=True)
            found.append({"second": whole(torch.autograd.grad((slope**2).sum(), q)[0])})
    merged = [{f"second{i}": one["second"] for i, one in enumerate(pair)} for pair in (found[:2], found[2:])]
    return against(*merged)


def wasserstein(plan: mw.Plan) -> Errors:
    """Three steps of a critic with gradient penalty, at points between real and made-up samples."""
    found = []
    for model, put in both(plan, critic()):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))
        for step in range(3):
            real, fake, share = sample(10 + step), sample(20 + step), sample(30 + step).sigmoid()[:, :1, :1, :1, :1]
            between = put(share * real + (1 - share) * fake)
            loss = model(put(fake)).mean() - model(put(real)).mean() + 10 * slope_penalty(model, between)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(gradients(model) | state(model) | {"loss": whole(loss)})
    return against(*found)


def penalised(**options: Any) -> Callable[[mw.Plan], Errors]:
    """The penalty alone, of a critic built with `options`."""

    def run(plan: mw.Plan) -> Errors:
        found = []
        for model, put in both(plan, critic(**options)):
            x = put(sample())
            (slope_penalty(model, x) + objective(model(x))).backward()
            found.append(gradients(model) | {"x": whole(x.grad)})
        return against(*found)

    return run


def hessian_products(plan: mw.Plan) -> Errors:
    """Hessian times vector, for inputs and for parameters, and torch's own form of it."""
    found = []
    for model, put in both(plan, critic(norm=nn.InstanceNorm3d)):
        x, v = put(sample()).requires_grad_(), put(sample(7))
        (g,) = torch.autograd.grad(objective(model(x)), x, create_graph=True)
        (hv,) = torch.autograd.grad(g, x, grad_outputs=v)
        names, parameters = zip(*model.named_parameters(), strict=True)
        first = torch.autograd.grad(objective(model(x)), parameters, create_graph=True)
        second = torch.autograd.grad(
            sum((a * p.detach()).sum() for a, p in zip(first, parameters, strict=True)), parameters
        )
        own = torch.autograd.functional.hvp(lambda t, m=model: objective(m(t)), x.detach(), v)[1]
        values = {"hv": whole(hv), "own": whole(own)}
        values |= {f"first {n}": whole(g) for n, g in zip(names, first, strict=True)}
        found.append(values | {f"second {n}": whole(g) for n, g in zip(names, second, strict=True)})
        assert all(p.grad is None for p in parameters)
    return against(*found)


def third_order(plan: mw.Plan) -> Errors:
    """Gradients of gradients of gradients."""
    found = []
    for model, put in both(plan, critic(norm=lambda c: nn.GroupNorm(2, c))):
        x = put(sample()).requires_grad_()
        value = objective(model(x))
        for _ in range(2):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = (g * g * put(sample(8))).sum()
        value.backward()
        found.append(gradients(model) | {"x": whole(x.grad)})
    return against(*found)


def graph_of_backward(plan: mw.Plan) -> Errors:
    """`loss.backward(create_graph=True)`: the summed `p.grad` is part of a graph, and is differentiated."""
    found = []
    for model, put in both(plan, critic()):
        objective(model(put(sample()))).backward(create_graph=True)
        held = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        sum((g * g).sum() for g in held.values()).backward()
        found.append(gradients(model) | {f"first {name}": whole(g) for name, g in held.items()})
        model.zero_grad(set_to_none=True)
    return against(*found)


def inner_steps(plan: mw.Plan) -> Errors:
    """Two inner steps with `functional_call` and an outer backward through them (Finn et al. 2017)."""
    found = []
    for model, put in both(plan, critic(norm=lambda c: nn.GroupNorm(2, c))):
        fast = dict(model.named_parameters())
        x = put(sample())
        for _ in range(2):
            loss = objective(torch.func.functional_call(model, fast, (x,)))
            slopes = torch.autograd.grad(loss, tuple(fast.values()), create_graph=True)
            fast = {name: p - 0.05 * g for (name, p), g in zip(fast.items(), slopes, strict=True)}
        outer = objective(torch.func.functional_call(model, fast, (put(sample(9)),)))
        outer.backward()
        found.append(gradients(model) | {"outer": whole(outer)})
    return against(*found)


def accumulated(plan: mw.Plan) -> Errors:
    """Penalties of two batches add up, the first unsummed under `no_sync`."""
    module, plain = mw.parallelize(critic(), plan, strict=True), critic()
    with mw.no_sync(module):
        slope_penalty(module, mw.shard(sample(1), plan)).backward()
    slope_penalty(module, mw.shard(sample(2), plan)).backward()
    for seed in (1, 2):
        slope_penalty(plain, sample(seed)).backward()
    return against(gradients(module), gradients(plain))


def hooked(plan: mw.Plan) -> Errors:
    """Hooks on parameters, activations and modules, in the first and in the second backward."""
    found = []
    for model, put in both(plan, critic()):
        seen: dict[str, Tensor] = {}
        model.first[0].weight.register_hook(lambda g: 2 * g)
        model.first.register_forward_hook(lambda m, i, o: o.register_hook(lambda g: g * 0.5) and None)
        model.up.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.update(up=whole(go[0])))
        x = put(sample())
        slope_penalty(model, x).backward()
        found.append(gradients(model) | {"x": whole(x.grad), **seen})
    return against(*found)


def frozen_and_plain_input(plan: mw.Plan) -> Errors:
    """Some parameters do not train, and the input needs no gradient: the penalty is on parameters alone."""
    found = []
    for model, put in both(plan, critic()):
        model.body.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(objective(model(put(sample()))), trained, create_graph=True)
        sum((g * g).sum() for g in slopes).backward()
        found.append(gradients(model))
    return against(*found)


def masked(plan: mw.Plan) -> Errors:
    """Dropout: the reference takes the mask that the ranks drew."""
    torch.manual_seed(5)
    plain = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.4), nn.Conv3d(4, 2, 3, padding=1)
    ).double()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    masks: list[Tensor] = []
    module[2].register_forward_hook(lambda m, i, o: masks.append((whole(o) != 0).double()))
    plain[2].forward = lambda h: h * masks.pop(0) / 0.6  # type: ignore[method-assign]
    found = []
    for model, x in ((module, mw.shard(sample(), plan)), (plain, sample())):
        slope_penalty(model, x).backward()
        found.append(gradients(model) | {"x": whole(x.grad)})
    return against(*found)


def exchanges(plan: mw.Plan) -> Errors:
    """A window of the user, and redistributions, under a penalty."""
    x = sample().requires_grad_()
    value = mw.shard(sample(), plan).requires_grad_()

    def penalty(t: Tensor, y: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((y.sin() * y).sum() + (t.cos() * t).sum(), t, create_graph=True)
        return (g * g * g).sum()

    penalty(x, x[:, :, 2:8].clone()).backward()
    axis = next((i for i, p in enumerate(value.placements) if p == Shard(2)), None)
    ranks = 1 if axis is None else value.device_mesh.size(axis)
    share = -(-6 // ranks)
    lo = [min(8, 2 + share * i) for i in range(ranks)]
    local = window(value, 2, lo, [min(8, first + share) for first in lo])
    y = from_local(local, value.device_mesh, value.placements, (*value.shape[:2], 6, *value.shape[3:]))
    swapped = y.redistribute(placements=[Shard(4) if p == Shard(2) else p for p in y.placements])
    penalty(value, swapped.redistribute(placements=[Replicate() for _ in y.placements])).backward()
    return {"x": error(whole(value.grad), x.grad)}


def plain_gradient(plan: mw.Plan) -> Errors:
    """`y.backward(gradient)` and `grad_outputs` with plain tensors: equal on every rank, so they count as whole."""
    found = []
    for model, put in both(plan, critic()):
        x = put(sample()).requires_grad_()
        h = model.first(x)
        (g,) = torch.autograd.grad(h, x, torch.ones(tuple(h.shape), dtype=h.dtype), create_graph=True)
        g.backward(sample(50))
        found.append(gradients(model) | {"g": whole(g), "x": whole(x.grad)})
    return against(*found)


def batched_gradients(plan: mw.Plan) -> Errors:
    """Several gradients in one call, and a Jacobian by torch's own function."""
    found = []
    for model, put in both(plan, critic()):
        x = put(sample()).requires_grad_()
        y = model(x)
        many = torch.stack([put(sample(40 + i))[:, :2, 0, 0, 0] for i in range(3)])
        (g,) = torch.autograd.grad(y, x, grad_outputs=many, is_grads_batched=True)
        one = torch.autograd.functional.jacobian(lambda t, m=model: m(t).sum(), x.detach())
        product = torch.autograd.functional.jvp(model, x.detach(), put(sample(6)))[1]
        found.append({"batched": whole(g), "jacobian": whole(one), "jvp": whole(product)})
    return against(*found)


MESHES = ("d4", "d2h2", "n2d2")
SCENARIOS = [
    Scenario("wasserstein", wasserstein, plans=("d2", "w2", *MESHES), limit=1e-8),
    Scenario("penalised_batch_norm", penalised(), plans=("d2", "d3", *MESHES), limit=1e-9),
    Scenario("penalised_instance_norm", penalised(norm=nn.InstanceNorm3d), plans=MESHES, limit=1e-9),
    Scenario("penalised_group_norm", penalised(norm=lambda c: nn.GroupNorm(2, c)), plans=MESHES, limit=1e-9),
    Scenario(
        "penalised_no_norm", penalised(norm=lambda c: nn.Identity()), plans=("d3", "d8", "d4", "d2h2"), limit=1e-9
    ),
    Scenario("penalised_checkpoint", penalised(recompute=True), plans=("d2", "d3", "d8", *MESHES), limit=1e-9),
    Scenario("few_rows", few_rows, plans=MESHES, limit=1e-9),
    Scenario("hessian_products", hessian_products, plans=MESHES, limit=1e-9),
    Scenario("third_order", third_order, plans=MESHES, limit=1e-9),
    Scenario("graph_of_backward", graph_of_backward, plans=MESHES, limit=1e-9),
    Scenario("inner_steps", inner_steps, plans=MESHES, limit=1e-9),
    Scenario("accumulated", accumulated, plans=MESHES, limit=1e-9),
    Scenario("hooked", hooked, plans=MESHES, limit=1e-9),
    Scenario("frozen_and_plain_input", frozen_and_plain_input, plans=MESHES, limit=1e-9),
    Scenario("masked", masked, plans=MESHES, limit=1e-9),
    Scenario("exchanges", exchanges, plans=("d2", "d3", *MESHES), limit=1e-9),
    Scenario("plain_gradient", plain_gradient, plans=MESHES, limit=1e-9),
    Scenario("batched_gradients", batched_gradients, plans=MESHES, limit=1e-9),
    Scenario("transforms", transforms.transforms, plans=("d2", *MESHES), limit=1e-9),
]
