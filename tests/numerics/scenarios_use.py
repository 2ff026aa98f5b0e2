"""Life around the module: optimisers, state, copies, inputs from parts, several plans, outputs outside, randomness."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from harness import error, plan_of, whole
from scenario_kit import SHAPE, Errors, against, gradients, net, objective, sample, state, trained
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.account import totals


def optimizer_before(plan: mw.Plan) -> Errors:
    """An optimiser made before `parallelize` stays valid: parameters keep their identity.

    A large eps: a bias before a norm has a true gradient of 0, whose rounding Adam would scale up.
    """
    plain, x = net(), sample()
    module = copy.deepcopy(plain)
    ids = [id(p) for p in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
    module = mw.parallelize(module, plan, strict=True)
    assert ids == [id(p) for p in module.parameters()], "parallelize made new parameters"
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4)
    return against(trained(module, mw.shard(x, plan), 3, optimizer), trained(plain, x, 3, theirs))


def gradient_clipping(plan: mw.Plan) -> Errors:
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    norms = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        objective(model(value)).backward()
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
    return {"norm": error(*norms), **against(gradients(module), gradients(plain))}


def state_dict_round_trip(plan: mw.Plan) -> Errors:
    """Names unchanged; a plain state dict loads into the parallel module and the other way round."""
    plain, other, x = net(1), net(7), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    module.load_state_dict(module.state_dict())
    first = against(state(module), state(plain))
    module.load_state_dict({name: whole(value) for name, value in other.state_dict().items()})
    errors = against(trained(module, mw.shard(x, plan)), trained(other, x))
    back = net(9)
    back.load_state_dict(state(module))
    return first | errors | {f"back {k}": v for k, v in against(state(back), state(other)).items()}


def copied(plan: mw.Plan) -> Errors:
    """A deep copy of a parallel module works by itself (moving averages of weights)."""
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    twin = copy.deepcopy(module)
    errors = against(trained(twin, mw.shard(x, plan)), trained(plain, x))
    assert all(p.grad is None for p in module.parameters()), "the copy shares gradients with the original"
    return errors


def from_local(plan: mw.Plan) -> Errors:
    """No rank ever holds the whole: built from parts it is the same tensor."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    part = x[mw.interval(SHAPE, plan, rank)].clone()
    split = mw.from_local(part, plan, SHAPE)
    assert tuple(split.shape) == SHAPE
    errors = {"input": error(whole(split), x)}
    labels = torch.arange(2 * 9 * 10 * 8).view(2, 9, 10, 8)
    mine = labels[mw.interval(tuple(labels.shape), plan, rank, layout="NDHW")]
    errors["labels"] = error(whole(mw.from_local(mine, plan, tuple(labels.shape), layout="NDHW")), labels)
    return errors | against(trained(module, split), trained(plain, x))


def two_plans(plan: mw.Plan) -> Errors:
    """Two modules under two plans in one process, used in turn; an error in one leaves both usable."""
    other = plan_of({4: "h4", 2: "h2", 1: "one"}[plan.ranks])
    plain, x = net(), sample()
    first = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    second = mw.parallelize(copy.deepcopy(plain), other, strict=True)
    a, b = first(mw.shard(x, plan)), second(mw.shard(x, other))
    message = ""
    try:
        first(mw.shard(x[:, :2], plan))  # three channels are expected
    except (RuntimeError, ValueError) as wrong:
        message = str(wrong)
    assert message, "an input with the wrong number of channels was accepted"
    objective(a).backward()
    objective(b).backward()
    truth = trained(plain, x)
    errors = against(gradients(first), truth) | {f"2 {k}": v for k, v in against(gradients(second), truth).items()}
    for module, p in ((first, plan), (second, other)):
        module.zero_grad()
        plain.zero_grad()
        found = against(trained(module, mw.shard(x, p)), trained(plain, x))
        errors |= {f"after {p} {k}": v for k, v in found.items()}
    return errors


def outside_the_module(plan: mw.Plan) -> Errors:
    """Detached outputs keep global semantics: metrics, `.item()`, comparisons, indexing."""
    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    y, t = module(mw.shard(x, plan)).detach(), plain(x).detach()
    hard, truth = y.argmax(1), t.argmax(1)
    found = {
        "mean": torch.tensor(y.mean().item(), dtype=torch.float64),
        "max": torch.tensor(y.float().max().item(), dtype=torch.float64),
        "share": torch.tensor((hard == 1).double().mean().item(), dtype=torch.float64),
        "count": torch.tensor(float((hard == 1).sum()), dtype=torch.float64),
        "overlap": whole(((hard == 1) & (y[:, 0] > 0)).double().sum((1, 2, 3))),
        "cpu": whole(y.cpu()),
    }
    wanted = {
        "mean": t.mean(),
        "max": t.float().max(),
        "share": (truth == 1).double().mean(),
        "count": (truth == 1).sum().double(),
        "overlap": ((truth == 1) & (t[:, 0] > 0)).double().sum((1, 2, 3)),
        "cpu": t,
    }
    return {name: error(found[name], value) for name, value in wanted.items()}


def other_thread(plan: mw.Plan) -> Errors:
    """Backward and metrics in another thread: no context that could be missing there."""
    import threading

    plain, x = net(), sample()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    loss = objective(module(mw.shard(x, plan)))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return against(gradients(module), trained(plain, x))


def frozen_part(plan: mw.Plan) -> Errors:
    """Parameters that need no gradient stay without one; the others are complete."""
    plain, x = net(), sample()
    plain.enter.requires_grad_(False)
    plain.last.bias.requires_grad_(False)
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    return against(trained(module, mw.shard(x, plan)), trained(plain, x))


def unused_branch(plan: mw.Plan) -> Errors:
    """A layer that the forward does not reach: its gradient stays None, the others are complete after backward."""
    plain, x = net(), sample()
    plain.never = nn.Conv3d(3, 3, 3).double()
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    return against(trained(module, mw.shard(x, plan)), trained(plain, x))


def shared_weights(plan: mw.Plan) -> Errors:
    """One parameter under two names."""
    plain, x = net(), sample()
    plain.twin = nn.Conv3d(3, 3, 3, padding=1).double()
    plain.other = nn.Conv3d(3, 3, 3, padding=1).double()
    plain.other.weight = plain.twin.weight
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    assert module.other.weight is module.twin.weight
    found = []
    for model, value in ((module, mw.shard(x, plan)), (plain, x)):
        objective(model(model.other(torch.tanh(model.twin(value))))).backward()
        found.append(gradients(model))
    return against(*found)


def random_calls(plan: mw.Plan) -> Errors:
    """Dropout keeps the share it promises and draws anew at every call; the seed decides."""
    shape = (4, 8, 9, 10, 8)
    ones = mw.shard(torch.ones(shape, dtype=torch.float64), plan)
    drop = mw.parallelize(nn.Dropout(0.25), plan, strict=True)
    first, second = whole(drop(ones)), whole(drop(ones))
    share = float((first > 0).double().mean())
    assert abs(share - 0.75) < 0.02, f"dropout 0.25 kept {share}"
    assert not torch.equal(first, second), "two calls drew the same mask"
    again = mw.parallelize(nn.Dropout(0.25), plan, strict=True)
    other = mw.parallelize(nn.Dropout(0.25), plan, strict=True, seed=1)
    assert torch.equal(whole(again(ones)), first), "the same seed drew another mask"
    assert not torch.equal(whole(other(ones)), first), "another seed drew the same mask"
    noise = whole(mw.parallelize(Noise(), plan, strict=True)(ones))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    planes = noise.movedim(2, 0).reshape(shape[2], -1)
    assert float(torch.corrcoef(planes).fill_diagonal_(0).abs().max()) < 0.15, "planes of noise repeat"
    return {"scale": error(first.max(), torch.tensor(1 / 0.75, dtype=torch.float64))}


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)


def report_rows(plan: mw.Plan) -> Errors:
    """`report` names layers and bytes; its sum is what was counted."""
    module = mw.parallelize(net(), plan, strict=True)
    x = mw.shard(sample(), plan)
    before = totals.copy()
    objective(module(x)).backward()
    moved = totals - before
    rows = mw.report(module)
    sent = sum(row["exchanged_bytes"] for row in rows)
    assert sent == moved.sent_bytes - moved.reduced_bytes, f"{sent} bytes in the rows, {moved} in total"
    if plan.ranks > 1 and whole_is_everywhere(plan):
        assert "enter.0" in {row["layer"] for row in rows}, rows
        assert moved.reduced_bytes > 0
    assert moved.gathered_bytes == 0
    return {}


def whole_is_everywhere(plan: mw.Plan) -> bool:
    """Whether every rank owns a part of the sample, so that each sends planes to a neighbour."""
    return all(mw.interval(SHAPE, plan, rank)[2].start < SHAPE[2] for rank in range(plan.ranks))


def functional_loss_target_forms(plan: mw.Plan) -> Errors:
    """The target may be split or plain: the same loss."""
    plain, x = net(), sample()
    labels = torch.randint(0, 2, (2, 9, 10, 8), generator=torch.Generator().manual_seed(4))
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=True)
    y = module(mw.shard(x, plan))
    truth = F.cross_entropy(plain(x), labels).detach()
    split = F.cross_entropy(y, mw.shard(labels, plan, layout="NDHW"))
    whole_target = F.cross_entropy(y, labels)
    return {
        "split": error(torch.tensor(split.item(), dtype=torch.float64), truth),
        "plain": error(torch.tensor(whole_target.item(), dtype=torch.float64), truth),
    }
