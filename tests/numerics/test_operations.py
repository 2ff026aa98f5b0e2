"""Every operation and way of use, on one rank and on meshes of 2, 3, 4 and 8, against one device.

The cases of one number of ranks run in one launch, when the first of them is asked for; only those that pytest
has selected (`-k`) run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import KEYS, OPERATIONS, is_ordinary, ranks_of, worker
from harness_driver import Key, Record, run_all, verdict

Runner = Callable[[Key], list[Record]]


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder: Path = tmp_path_factory.mktemp("cases")
    wanted = [
        item.callspec.params["key"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_case"
    ]
    done: dict[int, dict[Key, list[Record]]] = {}

    def records(key: Key) -> list[Record]:
        ranks = ranks_of(key)
        random = next((name for name, _ in wanted if name in _random), None)
        if ranks > 1 and random is not None and 1 not in done:
            records((random, "one"))  # one rank under parallelize is the reference of random cases
        if ranks not in done:
            keys = [k for k in wanted if ranks_of(k) == ranks]
            if ranks == 1:
                keys += [(name, "one") for name in {k[0] for k in wanted} & _random if (name, "one") not in keys]
            done[ranks] = run_all(worker, keys, ranks, folder)
        return done[ranks][key]

    return records


_random = {case.name for case in OPERATIONS if case.reference == "one"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "key",
    [pytest.param(key, id="-".join(key), marks=[] if is_ordinary(key) else pytest.mark.full) for key in KEYS],
)
def test_case(key: Key, runs: Runner) -> None:
    """Output, gradients, buffers, bytes: within the bounds."""
    problem = verdict(runs(key))
    assert not problem, f"{key[0]} under {lookup_plan(key)}:\n{problem}"


def lookup_plan(key: Key) -> str:
    return f"plan {key[1]} ({ranks_of(key)} ranks)"


def test_the_matrix_is_wide_enough() -> None:
    """The number of cases that the design asks for, and no name twice."""
    names = Counter(case.name for case in OPERATIONS)
    assert max(names.values()) == 1, names.most_common(3)
    assert len(names) >= 110
    ranks = Counter(ranks_of(key) for key in KEYS)
    assert all(ranks[count] >= 20 for count in (1, 2, 3, 4, 8)), ranks
    four = {name for name, plan in KEYS if ranks_of((name, plan)) == 4}
    assert four == {key[0] for key in KEYS if ranks_of(key) == 4 and is_ordinary(key)}  # without --full too
