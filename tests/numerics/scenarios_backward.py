"""Backward in unusual ways: twice, second order, interrupted, toggled, repeated to the bit, without leaks."""

from __future__ import annotations

import copy
import gc

import torch
from harness import whole
from scenario_kit import Errors, against, gradients, objective, pair, sample, state, trained
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel import transport


def second_order(plan: mw.Plan) -> Errors:
    """A gradient penalty; smooth layers, whose second derivative is not zero."""
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 2, 3, padding=1)).double()
    module = mw.parallelize(copy.deepcopy(plain), plan)

    def penalty(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
        value.requires_grad_()
        (g,) = torch.autograd.grad(objective(model(value)), value, create_graph=True)
        (g * g).sum().backward()
        return gradients(model)

    return against(penalty(module, mw.shard(sample(), plan)), penalty(plain, sample()))


def gradient_surgery(plan: mw.Plan) -> Errors:
    """Gradients read and changed between backward and step: norms, values, noise by hand, hooks."""
    module, plain, x = pair(plan)
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        model.last.weight.register_hook(lambda g: g * 3)
        objective(model(value)).backward()
        total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
        for p in model.parameters():
            p.grad.mul_(2).add_(p.detach(), alpha=0.1)
        found.append(gradients(model) | {"norm": whole(total)})
        model.zero_grad(set_to_none=False)
    return against(*found)


def same_bits(plan: mw.Plan) -> Errors:
    """Twice the same work gives the same bits: outputs, gradients, running statistics."""
    runs = []
    for _ in range(2):
        module, _, x = pair(plan)
        y = module(mw.shard(x, plan))
        objective(y).backward()
        runs.append({"output": whole(y), **gradients(module), **state(module)})
    return {name: float(not torch.equal(runs[0][name], runs[1][name])) for name in runs[0]}


def two_forwards(plan: mw.Plan) -> Errors:
    """Two batches through the module before one backward; then a backward per batch, in the other order."""
    module, plain, _ = pair(plan)
    found = []
    for model in (module, plain):
        inputs = [sample(seed) for seed in (21, 22)]
        outputs = [model(mw.shard(x, plan) if model is module else x) for x in inputs]
        (objective(outputs[0]) + 2 * objective(outputs[1])).backward()
        first = gradients(model)
        outputs = [model(mw.shard(x, plan) if model is module else x) for x in inputs]
        for y in reversed(outputs):
            objective(y).backward()
        found.append({f"first {k}": v for k, v in first.items()} | gradients(model))
    return against(*found)


def toggled(plan: mw.Plan) -> Errors:
    """`requires_grad_` changed after `parallelize` and between steps (fine-tuning)."""
    module, plain, x = pair(plan)
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        model.down.requires_grad_(False)
        objective(model(value)).backward()
        model.down.requires_grad_(True)
        model.last.bias.requires_grad_(False)
        objective(model(value)).backward()
        found.append(gradients(model))
    return against(*found)


def failed_backward(plan: mw.Plan) -> Errors:
    """A backward that raises in the middle, on every rank, leaves the module usable."""
    module, plain, x = pair(plan)
    value = mw.shard(x, plan)

    def raises(gradient: Tensor) -> None:
        raise KeyError("a hook of the user")

    y = module.enter(value)
    y.register_hook(raises)
    try:
        objective(module.last(torch.cat([y, y], 1))).backward()
    except KeyError:
        module.zero_grad()
        return against(trained(module, value), trained(plain, x))
    raise AssertionError("the exception of a hook was lost")


def no_leak(plan: mw.Plan) -> Errors:
    """Steps leave no tensors behind."""
    module, _, x = pair(plan)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    value = mw.shard(x, plan)
    counts = []
    for _ in range(3):
        trained(module, value, 1, optimizer)
        gc.collect()
        shared = _shared()
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        counts.append(sum(type(t) is not Tensor or t.untyped_storage().data_ptr() not in shared for t in tensors))
        del tensors
    assert counts[1] == counts[2], f"tensors alive after each step: {counts}"
    return {}


def _shared() -> set[int]:
    """Where tensors of shared memory lie, which stay: how many there are depends on how far neighbours are behind."""
    memories = [
        memory
        for channel in transport._living
        for memory in (*(slot.memory for slot in channel._slots), *channel._theirs.values())
    ]
    places = [part for memory in memories for parts in memory._places.values() for part in parts]
    return {part.untyped_storage().data_ptr() for part in places if part.numel()}


def only_inputs(plan: mw.Plan) -> Errors:
    """`backward(inputs=...)` fills only what was asked for."""
    module, plain, x = pair(plan)
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        objective(model(value)).backward(inputs=[model.last.weight, model.enter[0].weight])
        found.append(gradients(model))
    return against(*found)


def mixed_losses(plan: mw.Plan) -> Errors:
    """Deep supervision: losses of several layers and of the input, a plain penalty on weights, a scaled loss."""
    module, plain, x = pair(plan)
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        early = model.enter(value)
        loss = objective(model(value)) + 0.3 * (early * early).mean() + early.abs().amax()
        loss = loss + 0.01 * sum((p**2).sum() for p in model.parameters()) + 0.1 * model.last.weight.abs().mean()
        (loss * 128 / 4).backward()
        found.append(gradients(model))
    return against(*found)
