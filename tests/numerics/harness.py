"""What is tested and how it is judged: a case, its single-device reference, and the error of every quantity.

The law of every case: the plain module on the whole input on one device, against the same module parallelized.
Output, input gradients, parameter gradients and buffers agree within the bound of the design; the bytes sent stay
within the closed form. The loss is the sum of the output times fixed random weights, so that no element's error
can hide behind another's.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from harness_bounds import Bound
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.account import totals
from meshwright.parallel.tensor import MESH_TYPES

PLANS: dict[str, dict[str, int]] = {
    "one": {},
    "d2": {"depth": 2},
    "d3": {"depth": 3},
    "d4": {"depth": 4},
    "d8": {"depth": 8},
    "h2": {"height": 2},
    "h3": {"height": 3},
    "h4": {"height": 4},
    "w2": {"width": 2},
    "w3": {"width": 3},
    "w4": {"width": 4},
    "w8": {"width": 8},
    "n4": {"data": 4},
    "d2h2": {"depth": 2, "height": 2},
    "h2w2": {"height": 2, "width": 2},
    "n2d2": {"data": 2, "depth": 2},
    "n2h2": {"data": 2, "height": 2},
    "n2w2": {"data": 2, "width": 2},
    "h2w4": {"height": 2, "width": 4},
    "d2h2w2": {"depth": 2, "height": 2, "width": 2},
    "n2d2h2": {"data": 2, "depth": 2, "height": 2},
    "n2": {"data": 2},
    "n3": {"data": 3},
    "d2w2": {"depth": 2, "width": 2},
    "d4w2": {"depth": 4, "width": 2},
    "n2w4": {"data": 2, "width": 4},
    "n2h2w2": {"data": 2, "height": 2, "width": 2},
}
FOUR = {5: ("d4", "h4", "d2h2", "n2d2"), 4: ("h4", "w4", "h2w2", "n2h2"), 3: ("w4", "n2w2"), 2: ("n4",)}
SAMPLE = {
    5: ("d2", "d3", "d8", "d2h2w2", "n2d2h2"),
    4: ("h2", "w3", "h2w4"),
    3: ("w2", "w3", "w8"),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of an operation, see DESIGN "How errors are measured"
NOISE = 1e-3  # of the largest gradient: what a gradient that is truly zero is measured against


def plan_of(name: str) -> mw.Plan:
    return mw.Plan.uniform(**PLANS[name])


@dataclass(frozen=True)
class Input:
    """One argument of the module. `plain` arguments are handed over whole, as targets and weights often are."""

    shape: tuple[int, ...]
    layout: str | None = None
    kind: str = "normal"  # normal, unit (0 … 1), probabilities (over dim 1), classes (whole numbers below `classes`)
    classes: int = 0
    plain: bool = False
    offset: float = 0.0

    @property
    def differentiable(self) -> bool:
        return self.kind == "normal" and not self.plain

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        if self.kind == "classes":
            return torch.randint(0, self.classes, self.shape, generator=generator)
        value = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "unit":
            value = value.sigmoid()
        if self.kind == "probabilities":
            value = value.softmax(1)
        return (value + self.offset).to(dtype)


@dataclass(frozen=True)
class Case:
    """An operation (or a small block) and what it is tried on."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    bound: Bound | None = None  # None: less than gathering every input
    plans: tuple[str, ...] = ()  # () = all meshes of four ranks that the layout of the first input has
    sample: bool = False  # also on 2, 3 and 8 ranks
    dtype: torch.dtype = torch.float64
    strict: bool = True
    training: bool = True
    steps: int = 1
    grad: bool = True
    reference: str = "plain"  # "plain" torch, or "one": one rank under parallelize (random masks)
    tolerance: float | None = None
    against_plain: float = 0.0  # fp32 only: error allowed as a multiple of plain torch's own error in this dtype

    def all_plans(self) -> tuple[str, ...]:
        ndim = len(self.inputs[0].shape)
        four = self.plans or FOUR[ndim]
        return ("one", *four, *(SAMPLE[ndim] if self.sample else ()))

    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


@dataclass
class Outcome:
    """Quantities of one run by name ("output", "grad input0", "grad weight", "buffer running_mean", "loss")."""

    values: dict[str, Tensor] = field(default_factory=dict)
    forward_bytes: int = 0
    backward_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    loss_scale: float = 0.0  # the sum of the absolute terms of the loss: what its rounding is measured against


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for item in result for t in outputs_of(item)]


def build(case: Case, dtype: torch.dtype) -> tuple[nn.Module, list[list[Tensor]], torch.Generator]:
    """Module, inputs of each step, and the generator that draws the weights of the loss: equal on every rank."""
    torch.default_generator.manual_seed(case.seed())  # torch.manual_seed formats the stack for each kind of device
    module = case.make().to(dtype).train(case.training)
    generator = torch.Generator().manual_seed(case.seed() + 1)
    inputs = [[spec.draw(generator, dtype) for spec in case.inputs] for _ in range(case.steps)]
    return module, inputs, generator


def weights_of(outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(tuple(y.shape), generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def run_plain(case: Case, compute: torch.dtype) -> Outcome:
    """The reference: plain torch, one device, inputs and parameters rounded to the dtype of the case."""
    module, steps, generator = build(case, case.dtype)
    module = module.to(compute)
    out = Outcome()
    for inputs in steps:
        args = [x.to(compute) if x.is_floating_point() else x for x in inputs]
        leaves = [x.requires_grad_(case.grad and s.differentiable) for x, s in zip(args, case.inputs, strict=True)]
        with torch.set_grad_enabled(case.grad):
            outputs = outputs_of(module(*leaves))
        loss = _loss(outputs, weights_of(outputs, generator))
        if case.grad and loss.requires_grad:
            loss.backward()
        _collect(out, module, outputs, loss, args)
    return out


def run_parallel(case: Case, plan: mw.Plan) -> Outcome:
    """The same under `parallelize`, through nothing but the public interface."""
    plain, steps, generator = build(case, case.dtype)
    module = mw.parallelize(copy.deepcopy(plain), plan, strict=case.strict)
    torch.default_generator.manual_seed(
        case.seed() + (dist.get_rank() if dist.is_initialized() else 0)
    )  # ranks need not agree
    out = Outcome()
    for inputs in steps:
        args = [
            x if spec.plain else mw.shard(x, plan, layout=spec.layout)
            for x, spec in zip(inputs, case.inputs, strict=True)
        ]
        for x, spec in zip(args, case.inputs, strict=True):
            if case.grad and spec.differentiable:
                x.requires_grad_()
        before = totals.copy()
        with torch.set_grad_enabled(case.grad):
            outputs = outputs_of(module(*args))
        out.forward_bytes += (totals - before).sent_bytes
        loss = _loss(outputs, weights_of(outputs, generator))
        before = totals.copy()
        if case.grad and loss.requires_grad:
            loss.backward()
        moved = totals - before
        out.backward_bytes += moved.sent_bytes - moved.reduced_bytes
        for y in outputs:
            if not isinstance(y, MESH_TYPES):
                out.problems.append(f"the output is a {type(y).__name__}, no DTensor")
        _collect(out, module, outputs, loss, args)
    return out


def _loss(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    terms = [(y * w).sum() for y, w in zip(outputs, weights, strict=True) if y.is_floating_point()]
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())


def _collect(out: Outcome, module: nn.Module, outputs: Sequence[Tensor], loss: Tensor, args: Sequence[Tensor]) -> None:
    """Later steps overwrite earlier ones; gradients and buffers accumulate by themselves."""
    out.loss_scale = sum(float(whole(y).abs().sum()) for y in outputs if y.is_floating_point())
    for index, y in enumerate(outputs):
        out.values[f"output{index}"] = whole(y)
        if tuple(y.shape) != tuple(out.values[f"output{index}"].shape):
            out.problems.append(f"output{index}.shape is {tuple(y.shape)}, not the global shape")
    out.values["loss"] = torch.tensor(loss.item(), dtype=torch.float64)
    for index, x in enumerate(args):
        if x.grad is not None:
            out.values[f"grad input{index}"] = whole(x.grad)
    for name, p in module.named_parameters():
        if p.grad is not None:
            out.values[f"grad {name}"] = whole(p.grad)
    for name, b in module.named_buffers():
        out.values[f"buffer {name}"] = whole(b)


def whole(value: Tensor) -> Tensor:
    """The global value as a plain tensor."""
    if isinstance(value, MESH_TYPES):
        value = value.full_tensor()
    return value.detach().clone()


def compare(
    ours: dict[str, Tensor], truth: dict[str, Tensor], loss_scale: float = 0.0, start: float = 0.0
) -> dict[str, float]:
    """For every quantity |a − b| over the larger of max|b| and 10⁻³ × the largest gradient (gradients only).

    `start`: about the largest gradient of the outputs, which counts too; it matters where all others are truly 0.
    """
    gradients = [peak(value) for name, value in truth.items() if name.startswith("grad")]
    largest = max([start, *gradients])
    errors: dict[str, float] = {}
    for name in sorted(set(ours) | set(truth)):
        a, b = ours.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            errors[name] = math.inf
            continue
        floor = NOISE * largest if name.startswith("grad") else loss_scale if name == "loss" else 0.0
        errors[name] = error(a, b, floor)
    return errors


def peak(value: Tensor) -> float:
    return float(value.detach().double().abs().max()) if value.numel() else 0.0


def error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """max|a − b| / max(max|b|, floor); 0 where both are 0, infinite where a is not a number."""
    difference = peak(a.double() - b.double())
    if difference == 0.0:
        return 0.0
    scale = max(peak(b), floor)
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


def limits(case: Case, truth: Outcome) -> dict[str, float]:
    """The largest error allowed for each quantity."""
    base = case.tolerance if case.tolerance is not None else TOLERANCE[case.dtype]
    if not case.against_plain:
        return dict.fromkeys(truth.values, base)
    own = compare(run_plain(case, case.dtype).values, truth.values, truth.loss_scale)
    return {name: max(base, case.against_plain * own[name]) for name in truth.values}


def byte_limit(case: Case, plan: mw.Plan) -> int:
    """Bytes that all ranks together may send, forward and backward, over all steps."""
    shapes = [spec.shape for spec in case.inputs]
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    if case.bound is None:
        elements = sum(math.prod(spec.shape) for spec in case.inputs if not spec.plain)
        return case.steps * 2 * (plan.ranks - 1) * elements * itemsize
    return case.steps * case.bound.bytes(plan, shapes, case.inputs[0].layout, itemsize)
