"""Random programs: chains of 3 to 8 operations that one device computes, and how each is judged on a mesh."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from drawn_strategies import LARGEST, MESHES
from harness import Case, Input, build, compare, plan_of, run_parallel, run_plain
from harness_driver import Key, Record, run_keys
from program_steps import OPERATIONS, Arguments
from torch import Tensor, nn

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import GatherWarning, totals

TOLERANCE = 1e-8  # of a whole model, see DESIGN "How errors are measured"
STEADY = 1e-9  # a program whose reference moves more when its input moves by NUDGE is no measure of ours
NUDGE = 1e-13
MOST = 6000  # elements of an intermediate result
GATHERED, REFUSED = "gathered", "refused"
_OPERATIONS, _WEIGHTS = list(OPERATIONS), [op.weight for op in OPERATIONS.values()]


class Step(nn.Module):
    """One operation; a layer of its own, so that reports and refusals can name it."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments
        layer = OPERATIONS[name].layer
        self.layer = layer(arguments) if layer else None

    def forward(self, y: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        return OPERATIONS[self.name].run(y, self.arguments, self.layer, earlier)


class Chain(nn.Module):
    def __init__(self, steps: Sequence[tuple[str, Arguments]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(*step) for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values[-1], values[:-1]))
        return values[-1]


@dataclass(frozen=True)
class Program:
    """The input's shape, the steps, and the mesh; as text `["d2h2", [2, 4, 5, 6, 7], [["conv", {...}], ...]]`."""

    plan: str
    shape: tuple[int, ...]
    steps: tuple[tuple[str, Arguments], ...]

    @property
    def key(self) -> Key:
        return json.dumps([self.shape, self.steps]), self.plan

    def __str__(self) -> str:
        return json.dumps([self.plan, self.shape, self.steps])

    @classmethod
    def parse(cls, text: str) -> Program:
        plan, shape, steps = json.loads(text)
        return cls(plan, tuple(shape), tuple((name, arguments) for name, arguments in steps))

    def case(self) -> Case:
        make = lambda: Chain(self.steps)  # noqa: E731
        return Case(self.key[0], make, (Input(self.shape),), strict=False, plans=(self.plan,))

    def judge(self, plan: str) -> Record:
        """On a rank: right, right by a reported gather, or refused by name (then `note` says so)."""
        case, record = self.case(), Record(self.key[0], plan)
        truth = run_plain(case, torch.float64)
        before = totals.copy()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ours = run_parallel(case, plan_of(plan))
            except UnsupportedError as refusal:
                record.note = f"{REFUSED}: {refusal}"
                if "layer" not in str(refusal):
                    record.failure = f"the refusal names no layer: {refusal}"
                return record
        record.errors = compare(ours.values, truth.values, truth.loss_scale, start=1.0)  # the loss is Σ y · N(0, 1)
        record.limits = dict.fromkeys(truth.values, TOLERANCE)
        problems = list(ours.problems)
        reports = [str(w.message) for w in told if issubclass(w.category, GatherWarning)]
        nbytes = (totals - before).gathered_bytes
        if nbytes:
            record.note = f"{GATHERED} {nbytes} bytes: {'; '.join(reports)}"
            if not reports:
                problems.append(f"{nbytes} bytes were gathered and no warning says so")
        record.failure = "; ".join(problems)
        return record


@lru_cache(maxsize=4)
def _program(name: str) -> Program:
    shape, steps = json.loads(name)
    return Program("one", tuple(shape), tuple((step, arguments) for step, arguments in steps))


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""
    run_keys(_program, keys, folder)


def draw(ranks: int, number: int) -> Program:
    """Program `number` for a mesh of `ranks`: the same in every run."""
    r = random.Random(f"{ranks} {number}")
    while True:
        ndim = r.randint(1, 3)
        shape = (r.randint(1, 3), r.randint(1, 4), *(r.randint(1, LARGEST[ndim]) for _ in range(ndim)))
        steps = _steps(r, shape, r.randint(3, 8))
        found = Program(r.choice(MESHES[ranks, ndim]), shape, steps)
        if legal(found):
            return found


def _steps(r: random.Random, shape: tuple[int, ...], count: int) -> tuple[tuple[str, Arguments], ...]:
    """Steps that are legal one after the other: each proposal is tried on one device."""
    torch.manual_seed(0)
    values, steps = [torch.randn(shape, dtype=torch.float64)], list[tuple[str, Arguments]]()
    while len(steps) < count:
        name = r.choices(_OPERATIONS, _WEIGHTS)[0]
        try:
            arguments = json.loads(json.dumps(OPERATIONS[name].draw(r, tuple(values[-1].shape))))
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = Step(name, arguments).double()(values[-1], values[:-1])
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError):
            continue
        if 0 < y.numel() <= MOST and 2 <= y.ndim <= 6 and y.isfinite().all():
            values.append(y)
            steps.append((name, arguments))
    return tuple(steps)


def legal(program: Program) -> bool:
    """Whether one device computes it, forward and backward, and rounding does not decide its result."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = run_plain(program.case(), torch.float64).values
            if not all(value.numel() and value.isfinite().all() for value in truth.values()):
                return False
            for sign in (1, -1):
                moved = _nudged(program, sign)
                if any(error > STEADY for error in compare(moved, truth, float("inf")).values()):
                    return False
    except (ValueError, RuntimeError, IndexError):
        return False
    return max(float(value.abs().max()) for value in truth.values()) < 1e6


def _nudged(program: Program, sign: int) -> dict[str, Tensor]:
    """The reference with its input moved by a rounding error."""
    case = program.case()
    module, [[x]], generator = build(case, torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    case = replace(case, inputs=(_Moved(case.inputs[0].shape, by=sign * NUDGE * noise),))
    del module, generator
    return run_plain(case, torch.float64).values


@dataclass(frozen=True)
class _Moved(Input):
    by: Any = 0.0

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return super().draw(generator, dtype) + self.by


def shorter(program: Program) -> list[Program]:
    """The program without one of its steps, or on a smaller input, where that is legal."""
    found = [
        replace(program, steps=(*program.steps[:i], *program.steps[i + 1 :]))
        for i in reversed(range(len(program.steps)))
    ]
    for at, size in enumerate(program.shape):
        for less in dict.fromkeys((1, size // 2, size - 1)):
            if 0 < less < size:
                found.append(replace(program, shape=(*program.shape[:at], less, *program.shape[at + 1 :])))
    return [one for one in found if one.steps and legal(one)]
