"""Sums meet by their place in one order, whichever modules they are of, and whatever a failed backward left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import meshwright as mw
from meshwright.errors import ExchangeError, UnsupportedError
from meshwright.parallel.collective import Sum, SumQueue
from meshwright.parallel.tensor import is_mesh
from meshwright.parallel.transport import VARIABLE, Transfer, channels
from meshwright.plan import exchange

LAYERS = 12  # of one bucket each, so that more sums are under way than may wait for the end
PLANS = [mw.Plan.uniform(height=2), mw.Plan.uniform(height=3), mw.Plan.uniform(height=2, width=2)]


class _Net(nn.Module):
    """Convolutions of 32 KiB, and a bias."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        layers = (nn.Conv2d(22, 22, kernel, padding=kernel // 2, bias=False) for _ in range(LAYERS))
        self.convs, self.bias = nn.ModuleList(layers), nn.Parameter(torch.randn(22, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x) * 0.1
        return x + self.bias


def _whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if is_mesh(value) else value
    return found.detach().clone()


def _on(plan: mw.Plan | None, kernel: int = 3) -> tuple[Any, Any]:
    """A net and its input, the same ones each time."""
    exchange.BUCKET_BYTES = exchange.SMALL_BUCKET_BYTES = 1 << (14 if kernel == 3 else 11)
    torch.manual_seed(0)
    model, x = _Net(kernel).double(), torch.randn(1, 22, 9, 8, dtype=torch.float64)
    return (model, x) if plan is None else (mw.parallelize(model, plan), mw.shard(x, plan))


def _grads(model: nn.Module) -> list[Tensor]:
    return [_whole(p.grad) for p in model.parameters()]


def _error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, truth, strict=True))


def _fails_at(model: Any, layer: int, seen: list[tuple[Any, Tensor]] | None = None) -> Any:
    """The next backward raises when the gradient of `layer` is there; what it sees of later layers goes to `seen`."""

    def fail(_: Any) -> None:
        if seen is not None:
            seen.extend((conv.weight.grad, _whole(conv.weight.grad)) for conv in model.convs[layer + 1 :])
        raise ValueError("as asked")

    return model.convs[layer].weight.register_post_accumulate_grad_hook(fail)


def after_failures(plan: mw.Plan) -> float:
    """The largest error after many backward passes that failed with sums under way, and of what those left: of
    another module, and of the one that failed."""
    seen: list[tuple[Any, Tensor]] = []
    model, x = _on(None)
    (model(x) ** 2).mean().backward()
    truth, errors = _grads(model), []
    for failure in range(12):
        model, x = _on(plan)
        hook = _fails_at(model, failure % (LAYERS - 1), seen)
        with pytest.raises(ValueError, match="as asked"):
            (model(x) ** 2).mean().backward()
        if failure % 3 == 2:
            hook.remove()
            model.zero_grad()
            (model(x) ** 2).mean().backward()
            errors.append(_error(_grads(model), truth))
    model, x = _on(plan)
    (model(x) ** 2).mean().backward()
    errors.append(_error(_grads(model), truth))
    return max(*errors, *(float((before - _whole(grad)).abs().max()) for grad, before in seen))


@pytest.mark.parametrize("transport", ["auto", "messages"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_sums_of_a_failed_backward_meet_no_other(
    plan: mw.Plan, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks count on them, so they end first; and what a hook saw stays as it was."""
    monkeypatch.setenv(VARIABLE, transport)
    assert max(mw.launch(after_failures, ranks=plan.ranks, args=(plan,))) < 1e-12


def failed_apart(plan: mw.Plan) -> str:
    """What is said where one rank failed a layer before the others. The layers need nothing of a neighbour."""
    model, x = _on(plan, kernel=1)
    _fails_at(model, 4 if dist.get_rank() else 5)
    with pytest.raises(ValueError, match="as asked"):
        (model(x) ** 2).mean().backward()
    model, x = _on(plan, kernel=1)
    with pytest.raises(ExchangeError) as caught:
        (model(x) ** 2).mean().backward()
    return str(caught.value)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_failed_apart_are_told(ranks: int) -> None:
    """Each says where: never a sum of two layers."""
    for rank, said in enumerate(mw.launch(failed_apart, ranks=ranks, args=(mw.Plan.uniform(height=ranks),))):
        numbers = [LAYERS - 5] + [LAYERS - 4] * (ranks - 1)
        assert said.startswith(f"rank {rank}: a backward failed")
        assert f"had started {numbers} sums" in said


def a_changed_gradient(plan: mw.Plan) -> tuple[str, float]:
    """What is said where a hook changes a gradient whose sum is under way, and the largest error of the other gradients
    then, and of all after the next step."""
    model, x = _on(plan)

    def change(_: Any) -> None:
        model.convs[-1].weight.grad.mul_(2)

    one, y = _on(None)
    (one(y) ** 2).mean().backward()
    truth = _grads(one)
    hook = model.convs[0].weight.register_post_accumulate_grad_hook(change)
    with pytest.raises(UnsupportedError) as caught:
        (model(x) ** 2).mean().backward()
    pairs = zip(model.parameters(), truth, strict=True)
    errors = [float((_whole(p.grad) - t).abs().max()) for p, t in pairs if p is not model.convs[-1].weight]
    hook.remove()
    model.zero_grad()
    (model(x) ** 2).mean().backward()
    return str(caught.value), max(_error(_grads(model), truth), *errors)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_changed_gradient_is_refused_by_its_name(plan: mw.Plan) -> None:
    """And not as a rank that does not answer; all others are there; the error is still held when the module goes on."""
    for said, error in mw.launch(a_changed_gradient, ranks=plan.ranks, args=(plan,)):
        assert "a hook changed the gradients of parameters of shape (22, 22, 3, 3)" in said
        assert error < 1e-12


def two_in_one(plan: mw.Plan) -> float:
    """The largest error of two modules in one backward, where ranks fold at different moments: the first what has
    arrived, the last what it must."""
    if dist.get_rank():  # what arrives is taken all the same: a rank that never has to wait would else take nothing
        takes = Transfer.is_complete
        Transfer.is_complete = lambda self: takes(self) and False  # type: ignore[method-assign]
    grads = []
    for on in (plan, None):
        (first, x), (second, _) = _on(on), _on(on)
        if on is plan:
            for p in (*first.parameters(), *second.parameters()):  # all that was sent is here before the next sum
                p.register_post_accumulate_grad_hook(lambda _: dist.barrier())
        (second(first(x)) ** 2).mean().backward()
        grads.append(_grads(first) + _grads(second))
    return _error(*grads)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_modules_of_one_backward_share_the_order(plan: mw.Plan) -> None:
    """A generator and its discriminator."""
    assert max(mw.launch(two_in_one, ranks=plan.ranks, args=(plan,))) < 1e-12


def on_one_axis_twice() -> bool:
    """A sum over two of three axes has a second one, on an axis where another module's is under way: one rank has
    folded that already, the others have not."""
    group, me = dist.new_group(), dist.get_rank()
    channels(group)
    channels(group, 1)
    other, queue = [torch.full((6,), 1.0 + me)], SumQueue()
    under_way = Sum(other, group, lane=1, out=other)
    queue.add(under_way)
    dist.barrier()
    if me == 0:
        under_way.fold(apart=True)
    mine = [torch.full((6,), 10.0 * (1 + me))]
    second = Sum(mine, group, lane=1, out=mine)
    queue.add(second)
    queue.fold([second])
    second.wait()
    queue.fold([under_way])
    under_way.wait()
    return bool(mine[0].eq(60).all()) and bool(other[0].eq(6).all())


def test_second_sums_keep_the_order() -> None:
    """Through the queue, as those of `Summed.land` do."""
    assert all(mw.launch(on_one_axis_twice, ranks=3))
