"""Operations without a split form: gathered exactly and reported, or refused under `strict` before communication."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from harness import FOUR, Call, Case, Input, compare, plan_of, run_parallel, run_plain
from harness_driver import Key, Record, run_keys
from torch import Tensor, nn

import meshwright as mw
from meshwright.errors import StrictError, UnsupportedError
from meshwright.parallel.account import GatherWarning, totals

X3 = Input((2, 3, 9, 10, 7))
X2 = Input((2, 4, 11, 13))
X1 = Input((2, 4, 21))


class Outer(nn.Module):
    """Gives the operation a layer name to be blamed by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Any:
        return self.inner(*args)


@dataclass(frozen=True)
class Fallback:
    """`must_refuse`: under these plans no rule can exist that moves less than everything, so `strict` refuses.

    `moves_first`: an exchange that has a rule comes before the refused operation (a flatten, a crop).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    must_refuse: tuple[str, ...] = ()
    moves_first: bool = False
    refused: bool = False  # also without `strict`: it cannot be gathered (it writes in place)
    grad: bool = True

    def all_plans(self) -> tuple[str, ...]:
        return FOUR[len(self.inputs[0].shape)]

    def judge(self, plan: str) -> Record:
        case = Case(self.name, lambda: Outer(self.make()), self.inputs, strict=False, grad=self.grad)
        truth = run_plain(case, torch.float64)
        before = totals.copy()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ours = run_parallel(case, plan_of(plan))
            except UnsupportedError as refusal:
                named = self.refused and "'inner'" in str(refusal) and totals.sent_bytes == before.sent_bytes
                return Record(self.name, plan, failure="" if named else str(refusal))
        gathered = (totals - before).gathered_bytes
        record = Record(self.name, plan, compare(ours.values, truth.values, truth.loss_scale))
        record.limits = dict.fromkeys(truth.values, 1e-10)
        problems = list(ours.problems)
        if gathered and not any(issubclass(w.category, GatherWarning) and "'inner'" in str(w.message) for w in told):
            problems.append(f"{gathered} bytes were gathered and no warning names the layer")
        problems += self._strict(case, plan, gathered)
        record.failure = "; ".join(problems)
        return record

    def _strict(self, case: Case, name: str, gathered: int) -> list[str]:
        """Under `strict` a gather becomes an error that names op and layer, and nothing has been sent."""
        plan = plan_of(name)
        torch.manual_seed(case.seed())
        module = mw.parallelize(copy.deepcopy(case.make()).double(), plan, strict=True)
        generator = torch.Generator().manual_seed(1)
        inputs = [x.draw(generator, torch.float64) for x in self.inputs]
        args = [x if s.plain else mw.shard(x, plan, s.layout) for x, s in zip(inputs, self.inputs, strict=True)]
        before = totals.copy()
        try:
            with torch.no_grad():
                module(*args)
        except StrictError as refused:
            moved = (totals - before).sent_bytes
            problems = [f"{moved} bytes were sent before the refusal"] if moved and not self.moves_first else []
            if "'inner" not in str(refused):
                problems.append(f"the refusal does not name the layer: {refused}")
            return problems
        if name in self.must_refuse:
            return ["strict=True did not refuse"]
        if gathered and (totals - before).gathered_bytes:
            return ["strict=True gathered"]
        return []


def gap(name: str, fn: Callable[..., Any], *inputs: Input, **options: Any) -> Fallback:
    return Fallback(f"fallback_{name}", lambda: Call(fn), inputs, **options)


def pool_and_unpool(x: Tensor) -> Tensor:
    y, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y * 2, where, 2, output_size=x.shape[2:])


def sampled(x: Tensor) -> Tensor:
    grid = torch.linspace(-0.9, 0.9, 6, dtype=x.dtype)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).expand(x.shape[0], -1, -1, -1)
    return F.grid_sample(x, points, align_corners=False)


class Recurrent(nn.Module):
    """An LSTM along a split dim."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.transpose(1, 2))[0]


def fractional(x: Tensor) -> Any:
    """Pooling whose windows begin where the given draws say."""
    draws = torch.linspace(0, 0.99, x.shape[0] * x.shape[1] * 2, dtype=x.dtype).view(*x.shape[:2], 2)
    return F.fractional_max_pool2d(x, 2, (5, 6), return_indices=True, _random_samples=draws)


def labelled(x: Tensor) -> Tensor:
    """CTC: every step of time meets every label."""
    labels = torch.tensor([[1, 2, 1], [3, 1, 2]])
    return F.ctc_loss(x.movedim(2, 0).log_softmax(2), labels, torch.tensor([21, 19]), torch.tensor([3, 2]))


def written_into_plain(x: Tensor) -> Tensor:
    """A plain buffer, as Fourier layers have, takes in part of a split tensor."""
    buffer = torch.zeros(x.shape, dtype=x.dtype)
    buffer[:, :, 1:3] = x[:, :, 1:3] * 2
    return buffer + x


FALLBACKS = [
    gap("sort_no_other_dim", lambda x: x[0, 0].sort(0)[0], X1, must_refuse=("w4",), moves_first=True),
    gap("table_written", written_into_plain, X2, moves_first=True),
    gap("topk", lambda x: x.flatten(1).topk(5)[0], X2),
    gap("quantile", lambda x: torch.quantile(x, 0.3), X3, moves_first=True),
    gap("mask_select", lambda x: x[x > 0], X2, must_refuse=FOUR[4]),
    gap("masked_select", lambda x: torch.masked_select(x, x > 0.5), X3),
    gap("nonzero", lambda x: (x > 1).nonzero(), X2, must_refuse=FOUR[4], grad=False),
    gap("unique", lambda x: (x * 2).round().unique(), X2, grad=False),
    gap("bincount", lambda x: (x.abs() * 3).long().flatten().bincount(minlength=20), X3, grad=False, moves_first=True),
    gap("roll_flat", lambda x: x.roll(5), X2),
    gap("roll_split", lambda x: x.roll((2, -3), (2, 3)), X2),
    gap("rot90", lambda x: torch.rot90(x, 1, (2, 3)), X2),
    gap("in_place_views", lambda x: (x * 1).unsqueeze_(2).squeeze_(2).transpose_(2, 3) * 2, X2),
    gap("diff", lambda x: x.diff(dim=2), X3),
    gap("matmul_split", lambda x: x @ x.transpose(-1, -2), X2),
    gap("bicubic", lambda x: F.interpolate(x, size=(15, 9), mode="bicubic"), X2),
    gap("bilinear_antialias", lambda x: F.interpolate(x, size=(6, 7), mode="bilinear", antialias=True), X2),
    gap("area", lambda x: F.interpolate(x, size=(5, 6, 3), mode="area"), X3),
    gap("grid_sample", sampled, X2),
    gap("lp_pool", lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 2), X2),
    gap("local_response", lambda x: F.local_response_norm(x, 3), X2),
    gap("max_unpool", pool_and_unpool, X2),
    gap("max_pool_indices", lambda x: F.max_pool2d(x, 2, return_indices=True), X2, grad=False),
    gap("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), X2),
    gap("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), Input((2, 4, 10, 12))),
    gap("ctc", labelled, X1),
    gap("fractional_max_pool", fractional, X2, must_refuse=FOUR[4]),
    gap("trapezoid", lambda x: torch.trapezoid(x, dim=2), X2),
    gap("einsum_split", lambda x: torch.einsum("nchw,ndhw->ncd", x, x), X2),
    gap("einsum_outer", lambda x: torch.einsum("nch,nck->nhk", x, x), X1),
    gap("outer_product", lambda x: x[:, :1] * x.transpose(-1, -2)[:, :, :4].mean(1, keepdim=True).mean(), X1),
    gap("renorm", lambda x: x.renorm(2, 2, 1.0), X1),
    Fallback("fallback_lstm", Recurrent, (X1,)),
]
KEYS: list[Key] = [(case.name, plan) for case in FALLBACKS for plan in case.all_plans()]


@lru_cache(maxsize=1)
def _table() -> dict[str, Fallback]:
    return {case.name: case for case in FALLBACKS}


def lookup(name: str) -> Fallback:
    return _table()[name]


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""
    run_keys(lookup, keys, folder)
