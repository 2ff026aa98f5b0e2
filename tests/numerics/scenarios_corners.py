"""Uses at the edge of the promise: right, or refused in words; never wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import error, plan_of, whole
from scenario_kit import Errors, against, gradients, net, objective, pair, sample, state, trained
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import meshwright as mw
from meshwright.errors import MeshwrightError
from meshwright.parallel.tensor import MESH_TYPES
from meshwright.plan.plan import Axis


def full_tensor_loss(plan: mw.Plan) -> Errors:
    """A loss of `full_tensor()` is computed on every rank; the gradient counts once."""
    module, plain, x = pair(plan)
    objective(module(mw.shard(x, plan)).full_tensor()).backward()
    return against(gradients(module), trained(plain, x))


def to_local_loss(plan: mw.Plan) -> Errors:
    """A loss of `to_local()`: the ranks' losses are summands of the global one."""
    module, plain, x = pair(plan)
    (module(mw.shard(x, plan)).to_local() ** 2).sum().backward()
    (plain(x) ** 2).sum().backward()
    return against(gradients(module), gradients(plain))


def shard_of_a_leaf(plan: mw.Plan) -> Errors:
    """`shard` is differentiable: the plain leaf gets the whole gradient."""
    module, plain, x = pair(plan)
    leaves = []
    for model in (module, plain):
        leaf = x.clone().requires_grad_()
        objective(model(mw.shard(leaf * 1, plan) if model is module else leaf * 1)).backward()
        leaves.append(leaf.grad)
    return {"leaf": error(*leaves)}


def plain_weight(plan: mw.Plan) -> Errors:
    """A plain parameter that meets a split activation gets its whole gradient on every rank."""
    x = sample()
    found = []
    for split in (True, False):
        weight = sample(5, shape=(3, 1, 1, 1)).requires_grad_()
        kernel = sample(6, shape=(2, 3, 3, 3, 3)).requires_grad_()
        value = mw.shard(x, plan) if split else x
        objective(F.conv3d(value * weight + weight.sum(), kernel, padding=1)).backward()
        found.append({"weight": whole(weight.grad), "kernel": whole(kernel.grad)})
    return against(*found)


def own_generators(plan: mw.Plan) -> Errors:
    """The ranks' global generators differ; weights drawn after `parallelize` are the same on every rank."""
    module, _, x = pair(plan)
    torch.manual_seed(1000 + (dist.get_rank() if dist.is_initialized() else 0))
    try:
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    except MeshwrightError:
        return {}  # refused in words
    values = state(module)
    if plan.ranks > 1:
        for value in values.values():
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value), "the ranks drew different weights"
    plain = net(3)
    plain.load_state_dict(values)
    return against(trained(module, mw.shard(x, plan)), trained(plain, x))


def moving_average(plan: mw.Plan) -> Errors:
    """Exponential moving averages and in-place arithmetic on parameters without gradients."""
    module, plain, x = pair(plan)
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        shadow = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            trained(model, value, 1, optimizer)
            with torch.no_grad():
                for mean, p in zip(shadow.parameters(), model.parameters(), strict=True):
                    mean.mul_(0.9).add_(p, alpha=0.1)
        found.append(state(shadow))
    return against(*found)


def optimizers(plan: mw.Plan) -> Errors:
    """The optimisers of torch, their variants, and a schedule."""
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "sgd_loop": lambda p: torch.optim.SGD(p, lr=0.01, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, amsgrad=True),
        "adam_fused": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-4, fused=True),
        "adam_loop": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-4, foreach=False),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-4),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3, eps=1e-4),
    }
    errors: Errors = {}
    for name, make in makers.items():
        module, plain, x = pair(plan)
        found = []
        for model, value in ((module, mw.shard(x, plan)), (plain, x)):
            optimizer = make(model.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            for _ in range(2):
                trained(model, value, 1, optimizer)
                schedule.step()
            found.append(state(model))
        errors |= {f"{name} {key}": value for key, value in against(*found).items()}
    return errors


def two_modules(plan: mw.Plan) -> Errors:
    """One module feeds another (a generator and its critic); inputs of another plan are refused."""
    plain_one, plain_two, x = (
        net(1),
        nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.AdaptiveAvgPool3d(1)).double(),
        sample(),
    )
    one, two = (mw.parallelize(copy.deepcopy(m), plan, strict=True) for m in (plain_one, plain_two))
    objective(two(one(mw.shard(x, plan)))).backward()
    objective(plain_two(plain_one(x))).backward()
    errors = against(gradients(one), gradients(plain_one))
    errors |= {f"critic {k}": v for k, v in against(gradients(two), gradients(plain_two)).items()}
    if plan.ranks == 4:
        other = plan_of("h4")
        try:
            mixed = one(mw.shard(x, other))
        except (MeshwrightError, ValueError, RuntimeError):
            return errors
        errors["another plan"] = error(whole(mixed), plain_one(x).detach())
    return errors


def conversion_after(plan: mw.Plan) -> Errors:
    """`module.float()` after `parallelize`: right, or refused."""
    module, plain, x = pair(plan)
    try:
        module.float()
        y = module(mw.shard(x.float(), plan))
        objective(y).backward()
    except (MeshwrightError, RuntimeError, TypeError):
        return {}
    found = against({"output": whole(y), **gradients(module)}, {"output": plain(x).detach(), **trained(plain, x)})
    # fp32 against fp64: rounding alone gives 1.4e-4 here (a bias before a norm), a wrong conversion gives 1
    return {name: max(0.0, value - 1e-3) for name, value in found.items()}


def numbers(plan: mw.Plan) -> Errors:
    """Reading values in Python: conditions, floats, lists, arrays, printing."""
    x = sample()
    split = mw.shard(x, plan)
    assert bool((split > 100).any()) is False
    assert float(split.max()) == float(x.max())
    assert split.sum(dim=(0, 2, 3, 4)).shape == (3,)
    assert len(split) == 2
    assert split.numel() == x.numel()
    assert isinstance(split, MESH_TYPES)
    assert "depth" in repr(split) or "height" in repr(split) or plan.ranks == 1
    flat = split.mean((2, 3, 4))
    assert torch.tensor(flat.tolist(), dtype=torch.float64).shape == (2, 3)
    if split.std() > 0.5:  # a condition on a global value: the same branch on every rank
        flat = flat + 1
    return {
        "list": error(torch.tensor(flat.tolist(), dtype=torch.float64), x.mean((2, 3, 4)) + 1),
        "array": error(torch.from_numpy(flat.numpy().copy()), x.mean((2, 3, 4)) + 1),
    }


def writes(plan: mw.Plan) -> Errors:
    """Writing into parts of a split tensor changes it everywhere, or is refused; it is never lost."""
    x = sample()

    def cut(t: Tensor) -> None:
        t[:, :, 2:5] = 0

    def row(t: Tensor) -> None:
        t[..., 1] += 1

    def one(t: Tensor) -> None:
        t[0, 1, 4, 3, 2] = 9

    def masked(t: Tensor) -> None:
        t[t > 1] = 0

    def channel(t: Tensor) -> None:
        t[:, 1] = t[:, 0] * 2

    def narrow(t: Tensor) -> None:
        t.narrow(2, 1, 3).mul_(5)

    def split(t: Tensor) -> None:
        for index, piece in enumerate(t.chunk(3, 2)):
            piece.mul_(index)

    def flat(t: Tensor) -> None:
        t.view(2, 3, -1).add_(1)

    def flipped(t: Tensor) -> None:
        t.transpose(2, 3).diagonal(dim1=2, dim2=3).zero_()

    errors: Errors = {}
    for write in (cut, row, one, masked, channel, narrow, split, flat, flipped):
        value, truth = mw.shard(x, plan), x.clone()
        write(truth)
        try:
            write(value)
        except (MeshwrightError, RuntimeError):
            continue
        errors[write.__name__] = error(whole(value), truth)
    return errors


def beyond_the_end(plan: mw.Plan) -> Errors:
    """A position outside a split line is torch's error on every rank, not a zero."""
    line = mw.shard(sample(), plan).mean((0, 1, 3, 4))
    for place in (-1, line.shape[0], line.shape[0] + 100):
        with pytest.raises(RuntimeError, match="out of bounds"):
            line.gather(0, torch.tensor([0, place]))
    return {}


def few_values(plan: mw.Plan) -> Errors:
    """Statistics of nothing, of too few values, and of complex ones."""
    x = sample()
    split = mw.shard(x, plan)
    count = x.shape[2] * x.shape[3]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*degrees of freedom.*")
        few = [torch.var(v, dim=(2, 3), correction=c) for c in (count, count + 1) for v in (split, x)]
    assert all(torch.equal(whole(value), few[1]) for value in few)
    assert torch.isinf(few[1]).all()
    empty = sample(shape=(0, 4, 9, 10, 8))
    norm = nn.BatchNorm3d(4).double()
    assert mw.parallelize(copy.deepcopy(norm), plan)(mw.shard(empty, plan)).shape == norm(empty).shape
    found = []
    for value in (split, x):
        complex_value = torch.complex(value, value * value)
        var, mean = torch.var_mean(complex_value, dim=(2, 4))
        found.append({"var": whole(var), "mean": whole(torch.view_as_real(mean)), "std": whole(complex_value.std())})
    return against(*found)


def unread_planes(plan: mw.Plan) -> Errors:
    """Infinities where no window reads leave the gradient of the weight finite, as on one device."""
    found = []
    for split in (True, False):
        torch.manual_seed(0)
        model: nn.Module = nn.Conv3d(3, 2, 3, stride=2).double()
        x = sample(shape=(2, 3, 10, 10, 7))
        x[:, :, 9] = x[:, :, :, 9] = torch.inf
        if split:
            model, x = mw.parallelize(model, plan), mw.shard(x, plan)
        objective(model(x)).backward()
        found.append(gradients(model))
        assert all(grad.isfinite().all() for grad in found[-1].values())
        for parameter in model.parameters():
            del parameter.grad
            assert parameter.grad is None
    return against(*found)


def axis_of_one_rank(plan: mw.Plan) -> Errors:
    """A dim that is split over a single rank has its padding."""
    lone = mw.Plan((Axis("height", 1, "height"), Axis("depth", plan.ranks, "depth")))
    x = sample(shape=(2, 3, 32, 7, 6))
    split = mw.shard(x, lone).redistribute(placements=(Shard(3), Shard(2)))
    found = []
    for value in (split, x):
        value.requires_grad_()
        y = F.max_pool3d(value, 3, 2, 1)
        objective(y).backward()
        found.append({"y": whole(y), "x": whole(value.grad)})
    return against(*found)


def thin_transposed(plan: mw.Plan) -> Errors:
    """One position a rank, with a stride along it: torch's own fp32 gradient of the input reads other memory there."""
    found = []
    for split in (True, False):
        torch.manual_seed(0)
        model: nn.Module = nn.ConvTranspose2d(4, 1, 3, stride=(1, 2), padding=1, output_padding=(0, 1), bias=False)
        x = sample(shape=(3, 4, 8, 4), dtype=torch.float32).to(memory_format=torch.channels_last)
        if split:
            model, x = mw.parallelize(model, plan), mw.shard(x, plan)
        x.requires_grad_()
        junk = [torch.full((3, 4, 8, 1), torch.nan) for _ in range(9)]  # what unwritten memory holds
        del junk
        objective(model(x)).backward()
        assert x.grad is not None
        found.append(gradients(model) | {"x": whole(x.grad)})
    return against(*found)
