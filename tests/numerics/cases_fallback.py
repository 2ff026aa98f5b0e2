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


def attention(x: Tensor) -> Tensor:
    """Every position looks at every other."""
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens)


def matrix_attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    weights = torch.softmax(tokens.transpose(1, 2) @ tokens / 2, -1)
    return tokens @ weights.transpose(1, 2)


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


FALLBACKS = [
    gap("cumsum", lambda x: x.cumsum(2), X3, must_refuse=("d4", "d2h2", "n2d2")),
    gap("cumprod", lambda x: x.cumprod(-1), X2),
    gap("sort", lambda x: x.sort(2)[0], X2, must_refuse=("h4", "h2w2", "n2h2")),
    gap("sort_batch_width", lambda x: x.sort(3)[0].cumsum(0).cumsum(2), X2, must_refuse=FOUR[4]),
    gap("argsort", lambda x: x.argsort(2), X3, grad=False),
    gap("topk", lambda x: x.flatten(1).topk(5)[0], X2),
    gap("median", lambda x: x.median(), X2, must_refuse=FOUR[4]),
    gap("quantile", lambda x: torch.quantile(x, 0.3), X3, moves_first=True),
    gap("kthvalue", lambda x: x.kthvalue(3, 2)[0], X3),
    gap("cummax", lambda x: x.cummax(2)[0], X2),
    gap("max_with_index", lambda x: x.max(2), X2, grad=False),
    gap("max_values_and_index", lambda x: x.max(2)[0], X2),
    gap("argmax_all", lambda x: x.argmax(), X2, grad=False),
    gap("unfold_view", lambda x: x.unfold(2, 3, 2), X3),
    gap("unfold_columns", lambda x: F.unfold(x, 3, padding=1), X2),
    gap("fold", lambda x: F.fold(F.unfold(x, 2, stride=2), (10, 12), 2, stride=2), X2),
    gap("fft", lambda x: torch.view_as_real(torch.fft.fftn(x, dim=(2, 3, 4))), X3),
    gap("rfft", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 0.5, n=x.shape[-1], dim=-1), X2),
    gap("index_select", lambda x: x.index_select(2, torch.tensor([4, 0, 4, 2])), X3),
    gap("index_list", lambda x: x[:, :, [5, 1, 1]], X3),
    gap("gather", lambda x: x.gather(2, torch.arange(9).flip(0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 10, 7)), X3),
    gap("take_along", lambda x: torch.take_along_dim(x, x.argsort(2), 2), X2),
    gap("mask_select", lambda x: x[x > 0], X2),
    gap("masked_select", lambda x: torch.masked_select(x, x > 0.5), X3),
    gap("nonzero", lambda x: (x > 1).nonzero(), X2, grad=False),
    gap("unique", lambda x: (x * 2).round().unique(), X2, grad=False),
    gap("bincount", lambda x: (x.abs() * 3).long().flatten().bincount(minlength=20), X3, grad=False, moves_first=True),
    gap("histogram", lambda x: torch.histc(x, 8, -2, 2), X3, grad=False),
    gap("roll_flat", lambda x: x.roll(5), X2),
    gap("roll_split", lambda x: x.roll((2, -3), (2, 3)), X2),
    gap("tril", lambda x: x.tril(), X2),
    gap("triu", lambda x: x.triu(1), X2),
    gap("diagonal", lambda x: x.diagonal(dim1=2, dim2=3), X2),
    gap("rot90", lambda x: torch.rot90(x, 1, (2, 3)), X2),
    gap("in_place_views", lambda x: (x * 1).unsqueeze_(2).squeeze_(2).transpose_(2, 3) * 2, X2),
    gap("diff", lambda x: x.diff(dim=2), X3),
    gap("matmul_split", lambda x: x @ x.transpose(-1, -2), X2),
    gap("attention", attention, X2, moves_first=True),
    gap("matrix_attention", matrix_attention, X2),
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
    gap("pairwise", lambda x: torch.cdist(x[:, 0], x[:, 1]), X2),
    gap("ctc", labelled, X1),
    gap("fractional_max_pool", fractional, X2, must_refuse=FOUR[4]),
    gap("trapezoid", lambda x: torch.trapezoid(x, dim=2), X2),
    gap("einsum_split", lambda x: torch.einsum("nchw,ndhw->ncd", x, x), X2),
    gap("einsum_outer", lambda x: torch.einsum("nch,nck->nhk", x, x), X1),
    gap("outer_product", lambda x: x[:, :1] * x.transpose(-1, -2)[:, :, :4].mean(1, keepdim=True).mean(), X1),
    gap("index_add", lambda x: x.index_add(2, torch.tensor([1, 3]), torch.ones(2, 4, 2, dtype=x.dtype)), X1),
    gap("logcumsumexp", lambda x: x.logcumsumexp(2), X1),
    gap("renorm", lambda x: x.renorm(2, 2, 1.0), X1),
    Fallback("fallback_lstm", Recurrent, (X1,)),
    gap("repeat_split", lambda x: x.repeat(1, 1, 2), X1),
    gap("tile_all", lambda x: x.tile((2, 1, 3)), X1),
    gap("repeat_interleave_split", lambda x: x.repeat_interleave(3, dim=2), X1),
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
