"""Convolutions split by filters: the cases of all others once more with every convolution that can be split so, a
network whose own sizes ask for it, what travels, and where the split is when the module returns."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import KEYS, lookup, worker
from harness import error, plan_of, whole
from harness_driver import Key, Record, run_all, verdict
from torch import Tensor, nn

import meshwright as mw
from meshwright.models.resnet import resnet18
from meshwright.parallel import kernels, matrix_conv
from meshwright.parallel.account import totals
from meshwright.parallel.apply import ledger
from meshwright.parallel.rules import filters as rule
from meshwright.parallel.transport import VARIABLE
from meshwright.plan import filters

SHARE = 6  # of the cases that others run as well, one in so many runs here without --full


def everywhere() -> None:
    """Whatever can be split by filters is."""
    filters.FEWEST_WEIGHTS, filters.WEIGHTS_PER_INPUT, filters.STAY, filters.DIMS = 1, 0, 0, (3, 4, 5)
    rule.by_filters.cache_clear()


def products() -> None:
    """Gradients of weights are matrix products, which lie where the whole gradient has them."""
    matrix_conv.LARGE_WEIGHT = matrix_conv.LARGE_IMAGE_WEIGHT = 0
    matrix_conv.FEW_POSITIONS = matrix_conv.IMAGE_POSITIONS = math.inf
    kernels._planned.cache_clear()


def forced(keys: list[Key], folder: str) -> None:
    """Half of the cases with torch's kernels, half with products."""
    everywhere()
    worker(keys[: len(keys) // 2], folder)
    products()
    worker(keys[len(keys) // 2 :], folder)


def _splits_one_dim(plan: mw.Plan) -> bool:
    return sum(axis.role != "sample" and axis.size > 1 for axis in plan.axes) == 1


def _is_mine(key: Key) -> bool:
    return _splits_one_dim(plan_of(key[1])) and getattr(lookup(key[0]), "reference", "plain") != "one"


def _is_ordinary(key: Key) -> bool:
    is_close = key[0].startswith(("conv", "batch_norm", "sync", "no_sync", "two_modules", "shared", "accumulate"))
    return zlib.crc32("-".join(key).encode()) % (2 if is_close else SHARE) == 0


MINE = [key for key in KEYS if _is_mine(key)]
Runner = Callable[[Key], list[Record]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder: Path = tmp_path_factory.mktemp("filters")
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_forced"]
    wanted = [item.callspec.params["key"] for item in items]
    done: dict[int, dict[Key, list[Record]]] = {}

    def records(key: Key) -> list[Record]:
        ranks = plan_of(key[1]).ranks
        if ranks not in done:
            done[ranks] = run_all(forced, [k for k in wanted if plan_of(k[1]).ranks == ranks], ranks, folder)
        return done[ranks][key]

    return records


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "key",
    [pytest.param(key, id="-".join(key), marks=[] if _is_ordinary(key) else pytest.mark.full) for key in MINE],
)
def test_forced(key: Key, runs: Runner) -> None:
    """Values and gradients within the bounds; the closed form of the bytes is that of halos."""
    records = runs(key)
    for record in records:
        record.limit_bytes = -1
    problem = verdict(records)
    assert not problem, f"{key[0]} under {key[1]}:\n{problem}"


def _steps(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Any]:
    """Losses, gradients of the last step, weights and statistics after four."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), {}
    for step in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.state_dict())


def network(name: str) -> tuple[float, bool, bool]:
    """The largest error of ResNet-18 on two images of 64² against one device, whether it was split by filters, and
    whether fewer bytes of gradients left this rank than their sum takes."""
    plan = plan_of(name)
    torch.manual_seed(0)
    plain, x = resnet18(classes=7).double(), torch.randn(2, 3, 64, 60, dtype=torch.float64)
    model = resnet18(classes=7).double()
    model.load_state_dict(plain.state_dict())
    target = torch.tensor([3, 5])
    truth = _steps(plain, x, target)
    model = mw.parallelize(model, plan, strict=True)
    before = totals.copy()
    ours = _steps(model, mw.shard(x, plan), target)
    reduced = (totals - before).reduced_bytes / 4
    full = 2 * (plan.ranks - 1) / plan.ranks * sum(p.numel() for p in plain.parameters()) * 8
    worst = max(error(whole(ours[key]).double(), value.double()) for key, value in truth.items())
    return worst, ledger(model).by_filters, reduced < 0.75 * full


@pytest.mark.parametrize("name", ["h2", "w3", "n2h2"])
def test_network(name: str) -> None:
    found = mw.launch(network, ranks=plan_of(name).ranks, args=(name,), threads=1)
    for worst, by_filters, is_less in found:
        assert worst < 1e-8
        assert by_filters
        assert is_less or name == "n2h2"  # ranks with other samples have summands of the parts


class _Trunk(nn.Module):
    """Ends in what is split by channels, alone and with others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        early = self.body(x)
        return {"all": [early, self.last(early)], "number": 3}


def returned(name: str) -> tuple[float, bool, str]:
    """Parts of outputs lie where `mw.interval` says, and windows of what is between where the plan splits it."""
    everywhere()
    torch.manual_seed(1)
    plan, plain = plan_of(name), _Trunk().double()
    x = torch.randn(1, 3, 9, 10, dtype=torch.float64)  # one sample leaves ranks with others nothing
    with torch.no_grad():
        truth = plain(x)["all"]
    inner: list[str] = []
    dim = 2 if "h" in name else 3
    spans = [
        mw.interval(tuple(truth[0].shape), plan, rank)[dim]
        for rank in range(plan.ranks)
        if mw.interval(tuple(truth[0].shape), plan, rank)[0].start == 0
    ]
    windows: list[Tensor] = []

    def note(_: nn.Module, __: Any, y: Any) -> None:
        inner.append(str(y.placements))
        windows.append(mw.window(y, dim, [max(0, s.start - 1) for s in spans], [s.stop for s in spans]))

    model = mw.parallelize(plain, plan, strict=True)
    model.body.register_forward_hook(note)
    found = model(mw.shard(x, plan))
    rank = torch.distributed.get_rank()
    errors = []
    for y, t in zip(found["all"], truth, strict=True):
        errors.append(error(y.to_local(), t[mw.interval(tuple(t.shape), plan, rank)]))
    mine = list(mw.interval(tuple(truth[0].shape), plan, rank))
    mine[dim] = slice(max(0, mine[dim].start - 1), mine[dim].stop)
    errors.append(error(windows[0], truth[0][tuple(mine)]))
    return max(errors), found["number"] == 3, inner[0]


@pytest.mark.parametrize("name", ["h2", "w3", "n2w2"])
def test_outputs_are_split_as_planned(name: str) -> None:
    for worst, is_kept, inner in mw.launch(returned, ranks=plan_of(name).ranks, args=(name,), threads=1):
        assert worst < 1e-10
        assert is_kept
        assert "dim=1" in inner  # else this test would not ask for much


def of_another_plan() -> float:
    """An input split over four ranks meets parameters of a plan of two times two: ranks count in another way there."""
    everywhere()
    torch.manual_seed(2)
    plain, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).double(),
        torch.randn(2, 3, 9, 10).double(),
    )
    model = mw.parallelize(copy.deepcopy(plain), plan_of("n2h2"))
    with torch.no_grad():
        return error(whole(model(mw.shard(x, plan_of("h4")))), plain(x))


def test_parameters_of_another_plan() -> None:
    assert max(mw.launch(of_another_plan, ranks=4, threads=1)) < 1e-10


def in_a_row() -> tuple[bool, list[int]]:
    """Whether what a module makes of another one's output lies where the plan splits it; and a window of channels."""
    everywhere()
    plan = plan_of("h2")
    first, second = (mw.parallelize(nn.Conv2d(3, f, 3, padding=1).double(), plan) for f in (3, 8))
    y = second(first(mw.shard(torch.randn(1, 3, 7, 6, dtype=torch.float64), plan)))
    mine = y.full_tensor()[mw.interval(tuple(y.shape), plan, torch.distributed.get_rank())]
    return torch.equal(y.to_local(), mine), list(mw.window(y, 1, [2], [5]).shape)


def test_modules_in_a_row() -> None:
    """Each hands on what is split as planned, also what it made of another one's output."""
    for rank, (is_home, window) in enumerate(mw.launch(in_a_row, ranks=2, threads=1)):
        assert is_home
        assert window == [1, 3, 4 - rank, 6]


CHANNELS, FILTERS = 4, 7


def sent() -> tuple[int, int, int, int]:
    """Bytes that leave this rank in forward, in backward but for gradients of parameters, and for those; and how
    many elements of the input it has."""
    everywhere()
    plan = mw.Plan.uniform(height=torch.distributed.get_world_size())
    model = mw.parallelize(nn.Sequential(nn.Conv2d(CHANNELS, FILTERS, 3, padding=1)).double(), plan)
    x = mw.shard(torch.randn(2, CHANNELS, 11, 5, dtype=torch.float64), plan).requires_grad_()
    hidden: list[Any] = []
    model[0].register_forward_hook(lambda _, __, y: hidden.extend([y, totals.copy()]))  # before it is sent home
    before = totals.copy()
    model(x)
    y, ahead = hidden
    start = totals.copy()
    torch.autograd.backward(y, torch.ones_like(y))
    done = totals - start
    sent_ahead = (ahead - before).sent_bytes
    return sent_ahead, done.sent_bytes - done.reduced_bytes, done.reduced_bytes, x.to_local().numel()


@pytest.mark.parametrize(("ranks", "transport"), [(2, "auto"), (3, "auto"), (4, "auto"), (3, "messages")])
def test_bytes(ranks: int, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input goes to all others, the others' parts of its gradient go home, and parts of the gradients of weight and
    bias go to all others."""
    monkeypatch.setenv(VARIABLE, transport)
    for rank, (forward, backward, reduced, mine) in enumerate(mw.launch(sent, ranks=ranks, threads=1)):
        step = -(-FILTERS // ranks)
        own = max(0, min(FILTERS, (rank + 1) * step) - rank * step)
        everything = 2 * CHANNELS * 11 * 5
        assert forward == 8 * (ranks - 1) * mine
        assert backward == 8 * (everything - mine)
        assert reduced == 8 * (ranks - 1) * own * (CHANNELS * 9 + 1)
