"""Five optimiser steps of whole models give the weights of one device (fp64, 1e-8) on 1, 2, 4 and 8 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import plan_of
from models_exact import MODELS, save_reference, worker

import meshwright as mw

LIMIT = 1e-8
CASES = [(name, plan) for name, model in MODELS.items() for plan in model.plans]
Runner = Callable[[str, str], dict[str, float]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runner:
    folder: Path = tmp_path_factory.mktemp("models")
    wanted = [
        (item.callspec.params["name"], item.callspec.params["plan"])
        for item in request.session.items
        if item.originalname == "test_same_weights"
    ]
    done: dict[tuple[str, int], dict[str, dict[str, float]]] = {}

    def errors(name: str, plan: str) -> dict[str, float]:
        ranks = plan_of(plan).ranks
        if (name, ranks) not in done:
            if not (folder / f"{name}.npz").exists():
                save_reference(name, folder)
            keys = [key for key in wanted if key[0] == name and plan_of(key[1]).ranks == ranks]
            done[name, ranks] = mw.launch(worker, ranks=ranks, args=(keys, str(folder)), threads=1)[0]
        return done[name, ranks][f"{name}-{plan}"]

    return errors


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_same_weights(name: str, plan: str, trained: Runner) -> None:
    """Losses of every step, weights and running statistics at the end."""
    errors = trained(name, plan)
    wrong = {key: value for key, value in errors.items() if not value <= LIMIT}
    assert not wrong, f"{name} under {plan_of(plan)}: {wrong}"
    assert len(errors) > 10
