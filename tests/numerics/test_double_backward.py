"""Double backward (gradient penalties, inner steps, Hessians) on meshes of 2, 3, 4 and 8 ranks, against one device.

The cases of one number of ranks run in one launch, when the first of them is asked for; only those that pytest
has selected (`-k`) run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import ranks_of
from cases_double import CORE, DOUBLE, KEYS, is_ordinary, worker
from harness_driver import Key, Record, run_all, verdict

Runner = Callable[[Key], list[Record]]


@pytest.fixture(scope="session")
def doubles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("double")
    wanted = [
        item.callspec.params["key"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_double_backward" and item.path == Path(__file__)
    ]
    done: dict[int, dict[Key, list[Record]]] = {}

    def records(key: Key) -> list[Record]:
        ranks = ranks_of(key)
        if ranks not in done:
            done[ranks] = run_all(worker, [k for k in wanted if ranks_of(k) == ranks], ranks, folder)
        return done[ranks][key]

    return records


def _marks(key: Key) -> list[pytest.MarkDecorator]:
    return [] if is_ordinary(key) else [pytest.mark.full]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("key", [pytest.param(key, id="-".join(key), marks=_marks(key)) for key in KEYS])
def test_double_backward(key: Key, doubles: Runner) -> None:
    """First gradients, the penalty on them, and its gradients: within 1e-9."""
    problem = verdict(doubles(key))
    assert not problem, f"double backward of {key[0]} under plan {key[1]} ({ranks_of(key)} ranks):\n{problem}"


def test_the_cases_are_many() -> None:
    """Every number of ranks has its share, in the ordinary run too, and the core names cases that exist."""
    assert not CORE - {case.name for case in DOUBLE}
    every = Counter(ranks_of(key) for key in KEYS)
    ordinary = Counter(ranks_of(key) for key in KEYS if is_ordinary(key))
    assert every[4] >= 300, every
    assert ordinary[4] >= 100, ordinary
    assert all(ordinary[count] >= 10 for count in (2, 3, 8)), ordinary
