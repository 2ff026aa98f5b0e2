"""CosmoFlow on eight ranks: what is posted, what is accounted for, and what was planned are the same, rank by rank.

The plan is held to the closed form and to explicit positions too, at the sizes that run here; for 512³ and up to 512
ranks see tests/unit/test_exchange_plan.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from wire import Wire, watched

import meshwright as mw
from exchange_counts import Count, cosmoflow, counted, even, is_even, places, switch
from meshwright.models.cosmoflow import CosmoFlow, pools
from meshwright.parallel.account import totals
from meshwright.parallel.transport import VARIABLE
from meshwright.plan.exchange import RankStep, planned
from meshwright.plan.layers import layers_of

WIDTH = 4
EDGES = (32, 64)
SPLITS = {"d8": (8, 1, 1), "d4h2": (4, 2, 1), "d2h4": (2, 4, 1), "d2h2w2": (2, 2, 2)}  # depth × height × width
EVEN = {"d8": 5, "d4h2": 6, "d2h4": 6, "d2h2w2": 10}  # of the 10 layers at 32³, which the closed form is for
RUNS = [(edge, name) for edge in EDGES for name in SPLITS]
WEIGHTS = 27 * WIDTH * (4 + WIDTH * (2 + 8 + 32 + 128 + 256 + 256))  # of the convolutions
Rows = dict[tuple[str, str], tuple[int, int]]


@dataclass
class Phase:
    """Forward or backward of one rank. Rows are (bytes, messages) of (layer, op) by `mw.report`."""

    rows: Rows
    sent: tuple[int, int]
    reduced_bytes: int
    gathered_bytes: int
    wire: Wire


def plan_of(name: str) -> mw.Plan:
    return mw.Plan.uniform(**dict(zip(("depth", "height", "width"), SPLITS[name], strict=True)))


def network(edge: int, device: str) -> nn.Module:
    with torch.device(device):
        return CosmoFlow(edge, width=WIDTH)


def plan_for(edge: int, name: str) -> tuple[RankStep, ...]:
    example = torch.empty((1, 4, edge, edge, edge), device="meta")
    return planned(layers_of(network(edge, "meta"), example), plan_of(name))


def uneven() -> nn.Module:
    layers = [nn.Conv3d(2, 3, 5, padding="same", dilation=2), nn.ReLU(), nn.MaxPool3d(3, 2, 1)]
    layers += [nn.Conv3d(3, 4, (3, 2, 1), stride=(1, 2, 3), padding=1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.LazyLinear(5))


def flat() -> nn.Module:
    layers = [nn.Conv2d(3, 4, (3, 2), padding=1, dilation=(2, 1)), nn.AvgPool2d(2, ceil_mode=True), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 1, groups=2), nn.MaxPool2d(4, 3, dilation=1))


def line() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 7, padding=6), nn.AvgPool1d(3, 1, 1), nn.Conv1d(3, 2, 2, stride=4))


def near() -> nn.Module:
    """Average pooling that needs no neighbour along height, which becomes shorter before width is exchanged."""
    return nn.Sequential(nn.AvgPool2d((2, 4), stride=(4, 2), padding=(0, 1)))


# name → module, shape of its input, plans; whether the input is trained
OTHERS: dict[str, tuple[Any, tuple[int, ...], list[dict[str, int]], bool]] = {
    "uneven": (uneven, (2, 2, 13, 11, 9), [{"data": 2, "depth": 2, "height": 2}, {"depth": 4, "width": 2}], False),
    "flat": (flat, (4, 3, 17, 22), [{"height": 4, "width": 2}, {"data": 2, "height": 2, "width": 2}], True),
    "near": (near, (2, 2, 8, 18), [{"data": 2, "height": 2, "width": 2}, {"height": 2, "width": 4}], True),
    "line": (line, (3, 2, 29), [{"width": 8}, {"data": 2, "width": 4}, {"data": 4, "width": 2}], True),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape, _, trained = OTHERS[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    module(x)  # lazy layers learn their sizes
    return module, x.requires_grad_(trained)


def other_steps() -> dict[tuple[str, int], tuple[Phase, Phase]]:
    """On each rank: a step of every other network under every plan of it."""
    torch.set_num_threads(1)
    found = {}
    for name, (_, _, plans, trained) in OTHERS.items():
        for index, axes in enumerate(plans):
            plan = mw.Plan.uniform(**axes)
            module, x = made(name)
            module = mw.parallelize(module, plan, strict=True)
            x = mw.shard(x.detach(), plan).requires_grad_(trained)
            with watched() as wire:
                before = reading(module)
                y = module(x)
                forward = phase(module, before, wire)
                before = reading(module)
                y.backward(torch.ones_like(y))
                found[name, index] = forward, phase(module, before, wire)
    return found


def test_other_networks_are_planned_too() -> None:
    """Any kernel, stride, dilation, padding and plan, uneven and empty shards, and the batch split as well."""
    ranks = mw.launch(other_steps, ranks=8, threads=1)
    for name, (_, _, plans, _) in OTHERS.items():
        layers = layers_of(*made(name))
        for index, axes in enumerate(plans):
            plan = planned(layers, mw.Plan.uniform(**axes))
            assert sum(step.backward.nbytes for step in plan) > 0
            for step, found in zip(plan, ranks, strict=True):
                forward, backward = found[name, index]
                where = f"{name}, {axes}, rank {step.rank}"
                assert forward.sent == step.forward, where
                assert backward.sent == step.backward.plus(step.reduction), where
                assert backward.reduced_bytes == step.reduction.nbytes, where


def steps(transport: str) -> dict[tuple[int, str], tuple[Phase, Phase]]:
    """On each rank: the second step under every plan."""
    os.environ[VARIABLE] = transport
    torch.set_num_threads(1)
    return {(edge, name): step(edge, plan_of(name)) for edge, name in RUNS}


def step(edge: int, plan: mw.Plan) -> tuple[Phase, Phase]:
    torch.manual_seed(0)
    module = mw.parallelize(network(edge, "cpu"), plan, strict=True)
    x = mw.shard(torch.randn((1, 4, edge, edge, edge), generator=torch.Generator().manual_seed(1)), plan)
    module(x).square().mean().backward()
    with watched() as wire:
        before = reading(module)
        loss = module(x).square().mean()
        forward = phase(module, before, wire)
        before = reading(module)
        loss.backward()
        return forward, phase(module, before, wire)


def reading(module: nn.Module) -> tuple[Any, Rows]:
    rows = {(row["layer"], row["op"]): (row["exchanged_bytes"], row["messages"]) for row in mw.report(module)}
    return totals.copy(), rows


def phase(module: nn.Module, before: tuple[Any, Rows], wire: Wire) -> Phase:
    now, rows = reading(module)
    moved = now - before[0]
    change: Rows = {}
    for key, (nbytes, messages) in rows.items():
        earlier = before[1].get(key, (0, 0))
        if (nbytes, messages) != earlier:
            change[key] = nbytes - earlier[0], messages - earlier[1]
    sent = (moved.sent_bytes, moved.messages)
    return Phase(change, sent, moved.reduced_bytes, moved.gathered_bytes, wire.taken())


Ran = dict[tuple[int, str], list[tuple[Phase, Phase]]]


@pytest.fixture(scope="module", params=["messages", "auto"])
def ran(request: pytest.FixtureRequest) -> Ran:
    """For every plan what each rank sent, by messages of the backend or through shared memory."""
    ranks = mw.launch(steps, ranks=8, args=(request.param,), threads=1)
    return {key: [found[key] for found in ranks] for key in RUNS}


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_what_is_accounted_for_is_what_was_planned(ran: Ran, key: tuple[int, str]) -> None:
    """`mw.report` by layer and the totals, forward and backward, on every rank: equal to the byte."""
    for plan, (forward, backward) in zip(plan_for(*key), ran[key], strict=True):
        where = f"rank {plan.rank}"
        for way, found in (("forward", forward), ("backward", backward)):
            rows = {(e.layer.name, e.layer.op): tuple(getattr(e, way)) for e in plan.exchanges}
            assert found.rows == {key: sent for key, sent in rows.items() if sent != (0, 0)}, f"{where} {way}"
            assert found.gathered_bytes == 0
        assert forward.sent == plan.forward, where
        assert backward.sent == plan.backward.plus(plan.reduction), where
        assert (forward.reduced_bytes, backward.reduced_bytes) == (0, plan.reduction.nbytes), where


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_what_is_posted_is_what_was_planned(ran: Ran, key: tuple[int, str]) -> None:
    """Every piece handed to a transport. Sums made of pieces differ a little between ranks, but not in their total."""
    plans, total, gradients = plan_for(*key), 0, 2 * (8 - 1) * WEIGHTS * 4
    for plan, (forward, backward) in zip(plans, ran[key], strict=True):
        sent = [nbytes for nbytes in (*forward.wire.pieces, *forward.wire.gathers) if nbytes]
        assert (sum(sent), len(sent)) == plan.forward, f"rank {plan.rank} forward"
        assert not forward.wire.sums
        wire, wanted = backward.wire, plan.backward
        assert not wire.gathers
        if wire.sums:
            assert (sum(wire.pieces), len(wire.pieces)) == wanted, f"rank {plan.rank} backward"
            assert [ranks for _, ranks in wire.sums] == [8] * plan.reduction.messages
            assert sum(nbytes for nbytes, _ in wire.sums) == WEIGHTS * 4
        total += sum(wire.pieces)
    if not ran[key][0][1].wire.sums:
        assert total == sum(plan.backward.nbytes for plan in plans) + gradients


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_what_was_planned_is_the_closed_form(key: tuple[int, str]) -> None:
    """And where shards are uneven or empty, what explicit positions say; no layer is left out."""
    edge, name = key
    parts, plans, fit = SPLITS[name], plan_for(*key), 0
    layers = cosmoflow(edge, WIDTH, pools(edge))
    for index, layer in enumerate(layers):
        found = [Count(*plan.exchanges[index].forward, *plan.exchanges[index].backward) for plan in plans]
        assert found == counted(layer, parts), layer.name
        if is_even(layer, parts):
            fit += 1
            assert found == [even(layer, parts, place) for place in places(parts)], layer.name
    for plan, place in zip(plans, places(parts), strict=True):
        *_, last = plan.exchanges
        assert Count(*last.forward, *last.backward) == switch(16 * WIDTH, parts, place)
    assert len(plans[0].exchanges) == len(layers) + 1
    assert edge != 32 or fit == EVEN[name]
