"""Ways to run forward and backward: recomputation, precision, formats, no_grad, accumulation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import whole
from scenario_kit import Errors, against, gradients, net, objective, sample, state, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.parallel.account import totals
from meshwright.parallel.tensor import MESH_TYPES


def recompute(reentrant: bool) -> Callable[[mw.Plan], Errors]:
    def run(plan: mw.Plan) -> Errors:
        plain, x = net(), sample()
        module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
        module.recompute = plain.recompute = reentrant
        return against(trained(module, mw.shard(x, plan)), trained(plain, x))

    return run


def recompute_dropout(plan: mw.Plan) -> Errors:
    """The recomputed forward draws the masks of the first one: the same gradients as without recomputation."""

    class Dropping(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2))
            self.again = again

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)

    found = []
    for again in (False, True):
        torch.manual_seed(5)
        module = mw.parallelize(Dropping(again).double(), plan, strict=True)
        found.append(trained(module, mw.shard(sample(), plan)))
    return against(found[1], found[0])


def autocast_bf16(plan: mw.Plan) -> Errors:
    """Under bf16 autocast the distance to fp64 is that of one device (times 2), for output and gradients."""
    exact, plain = net(), net(dtype=torch.float32)
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    x = sample()

    def run(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(value)
        assert y.dtype == torch.bfloat16, y.dtype
        objective(y.float()).backward()
        return {"output": whole(y), **gradients(model)}

    y = exact(x)
    objective(y).backward()
    truth = {"output": y.detach(), **gradients(exact)}
    one = against(run(plain, x.float()), truth)
    ours = against(run(module, mw.shard(x.float(), plan)), truth)
    return {name: max(0.0, ours[name] / max(2 * one[name], 1e-2) - 1) for name in truth}


def module_bf16(plan: mw.Plan) -> Errors:
    plain = net().to(torch.bfloat16)
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    x = sample(dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    truth, one = trained(exact, x.double()), trained(plain, x)
    ours = against(trained(module, mw.shard(x, plan)), truth)
    own = against(one, truth)
    return {name: max(0.0, ours[name] / max(2 * own[name], 2e-2) - 1) for name in truth}


def norms_in_halves(plan: mw.Plan) -> Errors:
    """Batch and instance norm in half precision, far from zero too: the distance to fp64 is twice that of one device,
    for output, gradients and running statistics."""
    errors: Errors = {}
    for dtype, samples, last, mean in itertools.product(HALVES, (1, 2), (False, True), (0.0, 30.0)):
        for kind in (nn.BatchNorm3d, nn.InstanceNorm3d):
            torch.manual_seed(3)
            plain = kind(4, affine=True, track_running_stats=True)
            nn.init.uniform_(plain.weight, 0.5, 1.5)
            nn.init.normal_(plain.bias)
            module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
            x, g = (torch.randn(samples, 4, 5, 6, 7) for _ in range(2))
            x, g = (x + mean).to(dtype), (g + mean).to(dtype)
            if last:
                x, g = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, g))
            found = []
            for model in (copy.deepcopy(plain).double(), plain, module):
                # torch's own gradient of instance norm of one sample is wrong for channels_last gradients (2.13.0, CPU)
                grad = g if model is module else g.contiguous()
                value, grad = (t.double() for t in (x, grad)) if not found else (x, grad)
                value = (mw.shard(value, plan) if model is module else value).detach().requires_grad_()
                y = model(value)
                (y * (mw.shard(grad, plan) if model is module else grad)).sum().backward()
                found.append({"output": whole(y), "input": whole(value.grad), **gradients(model), **state(model)})
            truth, *tried = [{k: v for k, v in part.items() if v.is_floating_point()} for part in found]
            one, ours = (against(part, truth) for part in tried)
            name = f"{kind.__name__} {dtype} {samples} {last} {mean}"
            errors |= {f"{name} {k}": max(0.0, ours[k] / max(2 * one[k], LEAST[dtype]) - 1) for k in truth}
    return errors


HALVES = (torch.bfloat16, torch.float16)
LEAST = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one unit in the last place


def channels_last(plan: mw.Plan) -> Errors:
    """The format of the parts is the one that plain torch keeps, layer after layer; fp32, where torch has kernels."""
    plain, x = net(dtype=torch.float32), sample(dtype=torch.float32)
    exact = copy.deepcopy(plain).double()
    plain = plain.to(memory_format=torch.channels_last_3d)
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    formats: list[dict[str, bool]] = []
    outputs: list[dict[str, Tensor]] = []
    for model, whole_input in ((plain, x), (module, x)):
        value = whole_input.to(memory_format=torch.channels_last_3d)
        seen: dict[str, bool] = {}
        for name, layer in model.named_modules():
            layer.register_forward_hook(lambda m, a, y, name=name, seen=seen: seen.update({name: _last(y)}))
        y = model(value if model is plain else mw.shard(value, plan))
        objective(y).backward()
        formats.append(seen)
        outputs.append({"output": whole(y), **gradients(model)})
    y = exact(x.double())
    objective(y).backward()
    truth = {"output": y.detach(), **gradients(exact)}
    one, ours = against(outputs[0], truth), against(outputs[1], truth)
    errors = {name: max(0.0, ours[name] / max(3 * one[name], 1e-5) - 1) for name in truth}
    assert formats[0]["enter.0"], "plain torch itself does not keep the format: the check is empty"
    wrong = [name for name, last in formats[0].items() if last and not formats[1][name]]
    return errors | {f"format of {name!r}": 1.0 for name in wrong}


def _last(y: Tensor) -> bool:
    """Whether (this rank's part of) an activation is channels_last_3d; a part without elements has any format."""
    local = y.to_local() if isinstance(y, MESH_TYPES) else y
    return local.numel() == 0 or local.is_contiguous(memory_format=torch.channels_last_3d)


def no_grad_eval(plan: mw.Plan) -> Errors:
    plain, x = net().eval(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    with torch.no_grad():
        y = module(mw.shard(x, plan))
        assert not y.requires_grad
        assert not module.training
        return against({"output": whole(y)}, {"output": plain(x)})


def inference_mode(plan: mw.Plan) -> Errors:
    plain, x = net().eval(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    with torch.inference_mode():
        return against({"output": module(mw.shard(x, plan)).full_tensor().clone()}, {"output": plain(x).clone()})


def inference_then_training(plan: mw.Plan) -> Errors:
    """What a rule keeps from its first call, in inference mode, serves training too."""
    found = []
    for split in (True, False):
        x = mw.shard(sample(), plan) if split else sample()
        with torch.inference_mode():
            resized(x)
        x.requires_grad_()
        y = resized(x)
        (y * y).sum().backward()
        assert x.grad is not None
        found.append({"output": whole(y), "gradient": whole(x.grad)})
    return against(*found)


def resized(x: Tensor) -> Tensor:
    volume = F.interpolate(x, scale_factor=1.5, mode="trilinear", align_corners=True)
    return F.interpolate(volume.flatten(1, 2), scale_factor=0.7, mode="bicubic")


def autograd_grad(plan: mw.Plan) -> Errors:
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    found: list[dict[str, Tensor]] = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        value.requires_grad_()
        wanted = {"input": value, **dict(model.named_parameters())}
        grads = torch.autograd.grad(objective(model(value)), list(wanted.values()))
        if model is module:
            assert all(isinstance(g, MESH_TYPES) for g in grads)
            assert all(p.grad is None for p in model.parameters())
        found.append({name: whole(g) for name, g in zip(wanted, grads, strict=True)})
    return against(*found)


def no_sync(plan: mw.Plan) -> Errors:
    """Two accumulated micro batches and one synchronised equal the sum; nothing is reduced before."""
    plain = net()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    parts = [sample(seed) for seed in (11, 12, 13)]
    before = totals.copy()
    with mw.no_sync(module):
        for x in parts[:2]:
            objective(module(mw.shard(x, plan))).backward()
    assert (totals - before).reduced_bytes == 0, "gradients were reduced under no_sync"
    objective(module(mw.shard(parts[2], plan))).backward()
    for x in parts:
        objective(plain(x)).backward()
    return against(gradients(module), gradients(plain))


def accumulate(plan: mw.Plan) -> Errors:
    """Two backward passes without zero_grad."""
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    return against(trained(module, mw.shard(x, plan), steps=2), trained(plain, x, steps=2))


def two_losses_one_graph(plan: mw.Plan) -> Errors:
    """`retain_graph`, and a loss of two outputs."""
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        y = model(value)
        objective(y).backward(retain_graph=True)
        y.mean().backward()
    return against(gradients(module), gradients(plain))
