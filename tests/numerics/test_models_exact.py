"""Five optimiser steps of whole models give the weights of one device (fp64, 1e-8) on 1, 2, 4 and 8 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import plan_of
from harness_driver import Key, Record, run_all, verdict
from models_exact import KEYS, MODELS, save_reference, worker

Runner = Callable[[Key], list[Record]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runner:
    folder: Path = tmp_path_factory.mktemp("models")
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_same_weights"]
    wanted = [item.callspec.params["key"] for item in items]
    for name in {key[0] for key in wanted} & set(MODELS):
        save_reference(name, folder)
    done: dict[int, dict[Key, list[Record]]] = {}

    def records(key: Key) -> list[Record]:
        ranks = plan_of(key[1]).ranks
        if ranks not in done:
            done[ranks] = run_all(worker, [k for k in wanted if plan_of(k[1]).ranks == ranks], ranks, folder)
        return done[ranks][key]

    return records


@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", KEYS, ids=["-".join(key) for key in KEYS])
def test_same_weights(key: Key, trained: Runner) -> None:
    """Losses of every step, weights and running statistics at the end."""
    records = trained(key)
    problem = verdict(records)
    assert not problem, f"{key[0]} under {plan_of(key[1])}:\n{problem}"
    assert all(len(record.errors) > 10 for record in records)
