"""Gradients are summed in the memory of their summands: nobody who holds a summand may see that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.tensor import is_mesh
from meshwright.plan import exchange

LAYERS = 12  # of one bucket each, so that more sums are under way than may wait for the end


class _Net(nn.Module):
    """Convolutions of 32 KiB, and two parameters whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(22, 22, 3, padding=1, bias=False) for _ in range(LAYERS))
        self.one, self.other = (nn.Parameter(torch.randn(22, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x) * 0.1
        return x * (self.one + self.other)


def _whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if is_mesh(value) else value
    return found.detach().clone()


def _trained(plan: mw.Plan | None) -> tuple[list[Tensor], list[Tensor], float]:
    """Gradients of two backward passes without a reset; what hooks kept of and read from them on the way; and the
    share of gradients that stayed where they were, the smaller of the two."""
    torch.manual_seed(0)
    model, x = _Net().double(), torch.randn(1, 22, 9, 8, dtype=torch.float64)
    if plan is not None:
        model, x = mw.parallelize(model, plan), mw.shard(x, plan)
    kept: list[Any] = []
    read: list[Tensor] = []
    places: dict[int, int] = {}
    parameters = list(model.parameters())
    parameters[3].register_hook(kept.append)
    parameters[5].register_hook(lambda grad: kept.append(grad.detach()))
    parameters[7].register_hook(lambda grad: kept.append(grad.view(-1)))

    def noted(p: Any) -> None:
        places[id(p)] = p.grad._local_tensor.data_ptr() if is_mesh(p) else 0

    def read_others(p: Any) -> None:
        """By now the sums of all other layers are under way, and many of them have arrived."""
        read.extend(_whole(q.grad) for q in parameters if q is not parameters[0] and q.grad is not None)

    for p in parameters:
        p.register_post_accumulate_grad_hook(noted)
    model.convs[0].weight.register_post_accumulate_grad_hook(read_others)
    stayed = []
    for _ in range(2):
        (model(x) ** 2).mean().backward()
        stayed.append(sum(is_mesh(p) and p.grad._local_tensor.data_ptr() == places[id(p)] for p in parameters))
        read.extend(map(_whole, kept))  # now: what views a gradient sees the next one added to it
        kept.clear()
    return [_whole(p.grad) for p in parameters], read, min(stayed) / len(parameters)


def compared(plan: mw.Plan) -> tuple[float, float]:
    """The largest error against one device, and the share of gradients summed in place."""
    exchange.BUCKET_BYTES = exchange.SMALL_BUCKET_BYTES = 1 << 14
    grads, seen, _ = _trained(None)
    ours, ours_seen, stayed = _trained(plan)
    assert len(seen) == len(ours_seen) > 2 * LAYERS
    pairs = zip([*grads, *seen], [*ours, *ours_seen], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), stayed


@pytest.mark.parametrize(
    "plan", [mw.Plan.uniform(height=2), mw.Plan.uniform(height=3), mw.Plan.uniform(height=2, width=2)], ids=str
)
def test_summands_keep_their_value_until_backward_returns(plan: mw.Plan) -> None:
    """For hooks that keep a gradient, or a view of it, and hooks that read those of other layers."""
    for error, stayed in mw.launch(compared, ranks=plan.ranks, args=(plan,)):
        assert error < 1e-12
        assert stayed > 0.4  # what nobody else held, less what had to make room
