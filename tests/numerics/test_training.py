"""Training follows one curve whatever the plan, has the same bits for the same plan, and resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.cluster.launch import launch
from meshwright.config import OptimConfig
from meshwright.errors import NumericsError
from meshwright.train import check, optim, rundir
from training_jobs import STEPS, bits, blamed, disagreements, job, last, losses, train, write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank in fp64 that others are compared with."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train(job(data, "train.precision=fp64", "train.batch=2"), run)
    return run


PLANS = [(2, ()), (2, ("plan.data=2",)), (4, ("plan.height=2", "plan.width=2"))]


@pytest.mark.parametrize(("ranks", "plan"), PLANS, ids=["depth", "data", "height×width"])
def test_another_plan_follows_the_same_curve(
    ranks: int, plan: tuple[str, ...], data: list[str], whole: Path, tmp_path: Path
) -> None:
    train(job(data, "train.precision=fp64", "train.batch=2", *plan, ranks=ranks), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-9)
    assert len(losses(whole)) == STEPS
    assert losses(whole)[-1] < losses(whole)[0]
    mine, other = last(tmp_path / "run"), last(whole)
    assert mine.model.keys() == other.model.keys()
    for name, value in other.model.items():
        torch.testing.assert_close(mine.model[name], value, rtol=1e-8, atol=1e-8)


def test_the_same_seed_and_plan_give_the_same_bits_and_another_seed_does_not(data: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(job(data, f"seed={seed}", ranks=2), tmp_path / name)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert bits(tmp_path / "a") != bits(tmp_path / "c")


def test_a_finished_run_has_every_file_and_can_be_resumed_without_change(data: list[str], tmp_path: Path) -> None:
    run, settings = tmp_path / "run", job(data, ranks=2)
    train(settings, run)
    before = bits(run)
    names = {"config.yaml", "plan.yaml", "machine.json", "steps.jsonl", "validation.jsonl", "ranks.json", "layers.json"}
    names.add("reading.json")
    assert names | {"slices.npz", "summary.json", "checkpoints"} == {path.name for path in run.iterdir()}
    ranks = json.loads((run / "ranks.json").read_text())
    assert [rank["interval"][0] for rank in ranks] == [[0, 7], [7, 13]]
    assert all(rank["part_bytes"] == rank["ideal_bytes"] for rank in ranks)
    assert all(rank["peak_bytes"] > 0 and rank["state_bytes"] > 0 for rank in ranks)
    assert train(settings, run, resume=True)["step"] == STEPS
    assert bits(run) == before
    assert len(losses(run)) == STEPS


def test_check_finds_no_difference_and_would_see_one(data: list[str]) -> None:
    found, other = launch(check.run, 2, (job(data, ranks=2), 2), threads=1)
    assert other is None
    assert [row.quantity for row in found] == ["loss", "gradients", "weights"]
    assert all(row.ok for row in found)
    exact = check.Trace((1.0,), ({"w": torch.ones(3), "b": torch.zeros(1)},), ({"w": torch.ones(3)},))
    off = check.Trace((1.0,), ({"w": torch.ones(3), "b": torch.full((1,), 1e-6)},), ({"w": torch.ones(3)},))
    rows = check.differences(off, exact)
    assert [row.ok for row in rows] == [True, False, True]
    assert "b, step 1" in rows[1].where


def test_models_that_differ_between_ranks_are_named() -> None:
    answers = launch(disagreements, 3, threads=1)
    assert answers == answers[:1] * 3
    for how, words in (
        ("value", "0.bias (3,) float32"),
        ("buffer", "1.running_var (3,) float32"),
        ("shape", "ranks 0, 2: 0.weight (3, 2) float32; rank 1: 0.weight (4, 2) float32"),
        ("dtype", "rank 1: 0.weight (3, 2) float64"),
        ("more", "rank 1: 2.weight (1, 1) float32"),
        ("nothing", "all the same"),
    ):
        assert words in answers[0][how]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_names_the_first_layer(ranks: int) -> None:
    answers = launch(blamed, ranks, (ranks,), threads=1)
    assert answers == answers[:1] * ranks
    for where, words in (
        ("layer", f"'first' (Conv3d, output (1, 2, 4, 4, 4)), on rank {ranks - 1}"),
        ("weights", "the weights already have values that are not finite, first 'third.bias'"),
        ("input", "the input already has values that are not finite"),
    ):
        assert "step 7: the loss is nan" in answers[0][where]
        assert words in answers[0][where]


@pytest.mark.parametrize("steps", [1, 2, 10, 150])
def test_one_cycle_is_that_of_torch(steps: int) -> None:
    config = OptimConfig(lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(steps, 4))
    for step in range(steps):
        assert 0 < optim.learning_rate(config, step, steps) <= config.lr
        if steps >= 4:
            assert optim.learning_rate(config, step, steps) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
            optimizer.step()
            if step < steps - 1:
                theirs.step()
    assert optim.learning_rate(OptimConfig(lr=0.3, schedule="constant"), 5, 9) == 0.3


def test_clipping_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    for model in (mine, theirs):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.linspace(-3, 3 + index, parameter.numel()).reshape(parameter.shape)
    assert optim.clip(mine, 0.0) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)))
    optim.clip(mine, 1.0)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    theirs.bias.grad = torch.full((4,), float("nan"))
    with pytest.raises(NumericsError, match=r"first in 'bias' \(1 of 2 parameters\)"):
        optim.clip(theirs, 1.0)


def test_a_log_that_a_kill_has_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    rundir.forget_after(log, 2)
    rundir.append(log, {"step": 3, "again": True})
    assert rundir.records(log) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_validation_with_the_statistics_of_each_volume_leaves_the_training_alone(
    data: list[str], tmp_path: Path
) -> None:
    """The same under every plan, and the running averages stay what they were."""
    words = [*data, "train.precision=fp64", "train.batch=1", "model.norm=batch", "train.validate_every=2"]
    runs = {"running": ("train.validate_norm=running",), "own": ("train.validate_norm=own",)}
    for name, more in runs.items():
        train(job(words, *more), tmp_path / name)
    train(job(words, *runs["own"], "plan.depth=2", ranks=2), tmp_path / "split")
    assert losses(tmp_path / "own") == losses(tmp_path / "running")
    assert bits(tmp_path / "own", STEPS) == bits(tmp_path / "running", STEPS)
    own, running, split = (validations(tmp_path / name) for name in ("own", "running", "split"))
    assert split == pytest.approx(own, rel=1e-9)
    assert len(own) == STEPS // 2
    assert all(abs(a - b) > 1e-4 for a, b in zip(own, running, strict=True))


def validations(run: Path) -> list[float]:
    """The loss of each validation."""
    return [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]
