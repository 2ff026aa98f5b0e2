"""Unmodified networks of others, after optimiser steps: output, gradients, buffers and weights of one device.

A model runs under all plans of one number of ranks in one launch, and nothing of any of them is gathered.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from harness import error, plan_of, whole
from outside_models import MODELS
from torch import Tensor, nn

import meshwright as mw

LIMIT = 1e-8  # fp64, a whole model
SMALLEST = 1e-3  # weights and statistics below this are compared by their absolute difference
SPREADS = 10  # times the difference between two orders of summation on one device
CASES = [(name, ranks) for name, found in MODELS.items() for ranks in sorted({plan_of(p).ranks for p in found.plans})]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, turned: bool = False) -> dict[str, Tensor]:
    """One step; `turned`: the samples in the opposite order, which one device answers up to its rounding."""
    optimizer.zero_grad()
    x = (x.flip(0) if turned else x).detach().requires_grad_()
    y = model(x)
    y = y[0] if isinstance(y, list | tuple) else y
    weights = torch.randn(tuple(y.shape), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * (weights.flip(0) if turned else weights)).mean().backward()
    found = {"output": whole(y), "input": whole(x.grad)}  # type: ignore[arg-type]
    if turned:
        found = {name: value.flip(0) for name, value in found.items()}
    found |= {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return found | {f"state {name}": whole(value) for name, value in model.state_dict().items()}


def _trained(model: nn.Module, x: Tensor, steps: int, turned: bool = False) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    return [_step(model, optimizer, x, turned) for _ in range(steps)]


def _worst(found: list[dict[str, Tensor]], truths: list[dict[str, Tensor]]) -> tuple[float, str]:
    """The largest error and the quantity that has it. What is as good as zero is measured by the design's floor."""
    worst = 0.0, ""
    for got, truth in zip(found, truths, strict=True):
        assert got.keys() == truth.keys()
        largest = max(float(t.abs().max()) for name, t in truth.items() if name.startswith("gradient"))
        floors = {"gradient": SMALLEST * largest, "state": SMALLEST}
        for name, value in truth.items():
            worst = max(worst, (error(got[name], value, floors.get(name.split()[0], 0.0)), name))
    return worst


def compare(name: str, ranks: int) -> dict[str, dict[str, float | str]]:
    """For each plan of `ranks` ranks: the largest error, what is allowed, and what was gathered in bytes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")
    found = MODELS[name]
    torch.manual_seed(0)
    base = found.make().double()
    x = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truths = _trained(copy.deepcopy(base), x, found.steps)
    report: dict[str, dict[str, float | str]] = {}
    for key in (key for key in found.plans if plan_of(key).ranks == ranks):
        plan = plan_of(key)
        model = mw.parallelize(copy.deepcopy(base), plan)
        off, where = _worst(_trained(model, mw.shard(x, plan), found.steps), truths)
        allowed = LIMIT
        if off > LIMIT:  # fifty normalised layers may amplify rounding: then one device's own spread decides
            allowed = max(
                LIMIT, SPREADS * _worst(_trained(copy.deepcopy(base), x, found.steps, turned=True), truths)[0]
            )
        gathered = sum(int(entry["gathered_bytes"]) for entry in mw.report(model))
        report[key] = {"error": off, "where": where, "allowed": allowed, "gathered_bytes": gathered}
    return report


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "ranks"),
    [  # without --full a model runs on its largest number of ranks
        pytest.param(
            name, ranks, id=f"{name}-{ranks}", marks=[] if (name, ranks + 2) not in CASES else pytest.mark.full
        )
        for name, ranks in CASES
    ],
)
def test_model(name: str, ranks: int) -> None:
    """Within the bound of a model, without a single gather."""
    for report in mw.launch(compare, ranks=ranks, args=(name, ranks), threads=1):
        for plan, found in report.items():
            assert found["error"] <= found["allowed"], f"{plan}: {json.dumps(report)}"
            assert found["gathered_bytes"] == 0, f"{plan}: {json.dumps(report)}"
