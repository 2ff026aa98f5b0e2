"""The harness can fail: wrong values, missing gradients, gathered bytes and hanging ranks are all told."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Call, Case, Input, compare, error
from harness_bounds import Bound, Stage, conv, conv_out, padded, part, transposed
from harness_driver import Key, run_all, run_keys, verdict
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.tensor import MESH_TYPES

SHAPE = (2, 3, 8, 6, 5)
HALO = Bound((conv(3, 3, 1, 1),))


class NoHalo(nn.Module):
    """A convolution that forgets its neighbours: right inside, wrong at the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, MESH_TYPES):
            return F.conv3d(x, self.weight, padding=1)
        plan = mw.Plan.uniform(depth=2)
        y = F.conv3d(x.to_local(), self.weight.to_local(), padding=1)
        return mw.from_local(y, plan, (2, 3, 8, 6, 5))


class LostGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if not isinstance(x, MESH_TYPES) else x.detach() * 2 + x * 0


def one_rank_raises(x: Tensor) -> Tensor:
    if isinstance(x, MESH_TYPES) and dist.is_initialized() and dist.get_rank() == 1:
        raise ValueError("only here")
    return x + x.mean()


CASES = {
    case.name: case
    for case in (
        Case("right", lambda: nn.Conv3d(3, 3, 3, padding=1), (Input(SHAPE),), HALO),
        Case("no_halo", NoHalo, (Input(SHAPE),), HALO),
        Case("lost_gradient", LostGradient, (Input(SHAPE),), Bound()),
        Case("one_rank_raises", lambda: Call(one_rank_raises), (Input(SHAPE),)),
        Case("after", lambda: nn.Conv3d(3, 3, 3, padding=1), (Input(SHAPE),), HALO),
        Case("too_many_bytes", lambda: nn.Conv3d(3, 3, 3, padding=1), (Input(SHAPE),), Bound()),
    )
}


@lru_cache(maxsize=1)
def keys() -> list[Key]:
    return [(name, "d2") for name in CASES]


def worker(wanted: list[Key], folder: str) -> None:
    run_keys(CASES.__getitem__, wanted, folder)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = run_all(worker, keys(), 2, tmp_path_factory.mktemp("sabotage"), hang_s=5.0)
    return {name: verdict(found[name, "d2"]) for name in CASES}


def test_a_right_answer_passes(verdicts: dict[str, str]) -> None:
    assert verdicts["right"] == ""


def test_a_missing_halo_is_told(verdicts: dict[str, str]) -> None:
    for quantity in ("output0", "grad input0", "grad weight"):
        assert f"{quantity}: error" in verdicts["no_halo"]


def test_a_lost_gradient_is_told(verdicts: dict[str, str]) -> None:
    assert "grad input0: error" in verdicts["lost_gradient"]
    assert "output0" not in verdicts["lost_gradient"]


def test_too_many_bytes_are_told(verdicts: dict[str, str]) -> None:
    assert "the closed form allows 0" in verdicts["too_many_bytes"]


def test_a_failure_on_one_rank_leaves_the_others_their_run(verdicts: dict[str, str]) -> None:
    assert "only here" in verdicts["one_rank_raises"]
    assert verdicts["after"] == ""


def test_one_wrong_element_is_enough() -> None:
    truth = torch.randn(10, 10, 10, dtype=torch.float64)
    ours = truth.clone()
    ours[3, 4, 5] += 1e-8
    assert compare({"output0": ours}, {"output0": truth})["output0"] > 1e-10
    assert compare({"output0": truth}, {"output0": truth})["output0"] == 0.0


def test_nan_missing_and_misshapen_values_are_infinitely_wrong() -> None:
    truth = torch.ones(3)
    assert error(torch.tensor([1.0, math.nan, 1.0]), truth) == math.inf
    assert compare({}, {"grad w": truth})["grad w"] == math.inf
    assert compare({"grad w": truth}, {})["grad w"] == math.inf
    assert compare({"output0": truth[None]}, {"output0": truth})["output0"] == math.inf


def test_noise_in_a_zero_gradient_is_no_error() -> None:
    truth = {"grad weight": torch.tensor([2.0]), "grad bias": torch.tensor([0.0])}
    ours = {"grad weight": torch.tensor([2.0]), "grad bias": torch.tensor([1e-17])}
    assert compare(ours, truth)["grad bias"] < 1e-13


@pytest.mark.parametrize(
    ("stage", "n", "needs"),
    [
        (conv(1, 3, 1, 1), 8, {0: (0, 5), 1: (3, 8)}),
        (conv(1, 3, 2, 1), 8, {0: (0, 4), 1: (3, 8)}),
        (conv(1, 2, 2), 9, {0: (0, 4), 1: (4, 8)}),
        (transposed(1, 2, 2), 5, {0: (0, 3), 1: (2, 5)}),
    ],
)
def test_the_closed_forms_by_hand(stage: Stage, n: int, needs: dict[int, tuple[int, int]]) -> None:
    out = stage.sizes[0](n)
    for index, (lo, hi) in needs.items():
        assert list(stage.needs[0](n, part(out, 2, index))) == list(range(lo, hi))


def test_closed_form_bytes_by_hand() -> None:
    plan = mw.Plan.uniform(depth=2)
    planes = 2 * 3 * 6 * 5  # each rank receives one plane, forward and backward
    assert HALO.bytes(plan, [SHAPE], None, 8) == 2 * 2 * planes * 8
    assert padded(2, 1, 1).received(plan, (1, 1, 4), "NCD") == 0
    assert conv_out(7, 3, 2, 1, 1, 1) == 4
