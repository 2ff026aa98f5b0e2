"""Operations without a rule: the right answer with a report, or under `strict` a refusal before communication."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases_fallback import KEYS, worker
from harness_driver import Key, Record, run_all, verdict

Runner = Callable[[Key], list[Record]]


@pytest.fixture(scope="session")
def fallback_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("fallback")
    wanted = [
        item.callspec.params["key"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_fallback"
    ]
    done: dict[Key, list[Record]] = {}

    def records(key: Key) -> list[Record]:
        if not done:
            done.update(run_all(worker, wanted, 4, folder))
        return done[key]

    return records


@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", KEYS, ids=["-".join(key) for key in KEYS])
def test_fallback(key: Key, fallback_runs: Runner) -> None:
    """Exact without `strict`, reported with the layer's name; refused with it, nothing sent."""
    problem = verdict(fallback_runs(key))
    assert not problem, f"{key[0]} under plan {key[1]}:\n{problem}"
