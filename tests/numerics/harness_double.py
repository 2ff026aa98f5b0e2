"""The law of double backward: a penalty on first gradients, and what its own backward gives, against one device.

A case of the operations is taken as it is (module, inputs, plans). Its first gradients are taken with
`create_graph=True`; the sum of their squares, weighted so that no element's error hides behind another's, is
differentiated again. Every way asks for another set of gradients: ranks then walk through other parts of the graph.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Outcome, build, compare, outputs_of, plan_of, weights_of, whole
from harness_driver import Record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import meshwright as mw

LIMIT = 1e-9
WAYS = ("all", "inputs", "linear", "vectors")  # which first gradients are penalised, see `_penalised`


@dataclass(frozen=True)
class Double:
    """Double backward of `case` under each of `plans`, each in the first way and in one of the others."""

    case: Case
    plans: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.case.name

    def all_plans(self) -> tuple[str, ...]:
        return self.plans

    def judge(self, name: str) -> Record:
        """Run on this rank, in plain torch and parallelized."""
        record = Record(self.name, name)
        plan = plan_of(name)
        others = WAYS[1:]
        for way in (WAYS[0], others[zlib.crc32(f"{self.name} {name}".encode()) % len(others)]):
            try:
                with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative; this one has
                    truth = differentiate(self.case, None, way)
            except RuntimeError as missing:  # torch has no second derivative of some operators; then neither have we
                if "is not implemented" not in str(missing):
                    raise
                record.failure += _refusal(self.case, plan, way)
                continue
            ours = differentiate(self.case, plan, way)
            found = compare(ours.values, truth.values, truth.loss_scale)
            record.errors |= {f"{way}: {key}": value for key, value in found.items()}
        record.limits = dict.fromkeys(record.errors, LIMIT)
        return record


def _refusal(case: Case, plan: mw.Plan, way: str) -> str:
    """Empty if the case is refused, as torch does."""
    try:
        differentiate(case, plan, way)
    except RuntimeError as error:
        return "" if "is not implemented" in str(error) else str(error)
    return f"{way}: torch refuses, but there is a result"


def _penalised(way: str, leaves: list[Tensor], module: nn.Module) -> list[Tensor]:
    """The tensors whose first gradients are penalised."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if way == "vectors":  # biases and the like: what reaches them is not what reaches the weights
        return [p for p in parameters if p.ndim <= 1] or leaves
    return [*leaves, *parameters] if way == "all" else (leaves or parameters)


def differentiate(case: Case, plan: mw.Plan | None, way: str) -> Outcome:
    """First gradients, the penalty, and the gradients of the penalty; plain torch if `plan` is None."""
    module, steps, generator = build(case, case.dtype)
    if plan is not None:
        module = mw.parallelize(copy.deepcopy(module), plan, strict=case.strict)
    args = [
        x if plan is None or spec.plain else mw.shard(x, plan, layout=spec.layout)
        for x, spec in zip(steps[0], case.inputs, strict=True)
    ]
    leaves = [x.requires_grad_() for x, spec in zip(args, case.inputs, strict=True) if spec.differentiable]
    outputs = [y for y in outputs_of(module(*args)) if y.is_floating_point() and y.requires_grad]
    weights = weights_of(outputs, generator)
    loss: Any = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    if way != "linear":
        loss = loss + sum((y * y * w.cos()).sum() for y, w in zip(outputs, weights, strict=True))
    asked = _penalised(way, leaves, module)
    first = torch.autograd.grad(loss, asked, create_graph=True, allow_unused=True)
    kept = [g for g in first if g is not None]
    penalty: Any = sum((g * g * v.cos()).sum() for g, v in zip(kept, weights_of(kept, generator), strict=True))
    out = Outcome()
    out.values |= {f"grad first{i}": whole(g) for i, g in enumerate(first) if g is not None}
    out.values["loss"] = torch.tensor(penalty.item(), dtype=torch.float64)
    out.loss_scale = sum(float(whole(g).square().sum()) for g in kept)
    total = penalty + loss if way == "all" else penalty
    if total.requires_grad:
        total.backward()
    named = {f"input{i}": x for i, x in enumerate(leaves)} | dict(module.named_parameters())
    for key, x in named.items():  # none counts as zero: torch gives the one or the other, by the operator
        out.values[f"grad {key}"] = torch.zeros(tuple(x.shape), dtype=x.dtype) if x.grad is None else whole(x.grad)
    return out
