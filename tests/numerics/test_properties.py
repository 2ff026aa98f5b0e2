"""Random cases of the operations with windows and statistics, on meshes of 2, 3, 4 and 8 ranks, against one device.

All cases of one number of ranks are drawn first, then run in one launch. What fails is made smaller in further
launches and printed as the line that makes it again (`python tests/numerics/test_properties.py '["conv", "w2", ...]'`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from drawn import Drawn, worker
from drawn_shrink import shrink
from drawn_strategies import SHARES, cases, family_cases
from harness import plan_of
from harness_driver import Key, Record, run_all, verdict

ORDINARY = {2: 150, 3: 110, 4: 200, 8: 40}
FULL = 10  # times as many
SHOWN = 3  # failing cases that are made smaller


def run(drawn: Sequence[Drawn], folder: Path) -> dict[Key, list[Record]]:
    """Records of all ranks for each case."""
    return run_all(worker, [case.key for case in drawn], plan_of(drawn[0].plan).ranks, folder)


def failing(drawn: Sequence[Drawn], folder: Path) -> list[Drawn]:
    """The cases that do not hold."""
    if not drawn:
        return []
    found = run(drawn, folder)
    return [case for case in drawn if verdict(found[case.key])]


def report(drawn: Sequence[Drawn], folder: Path) -> str:
    """Empty if all hold; else each failing case, the first ones made smaller."""
    found = run(drawn, folder)
    broken = [case for case in drawn if verdict(found[case.key])]
    lines = []
    for case in broken[:SHOWN]:
        small = shrink(case, lambda some: failing(some, folder))
        lines += [f"{small}\n{verdict(run([small], folder)[small.key])}", f"  shrunk from {case}"]
    lines += [f"{case}: {verdict(found[case.key]).splitlines()[-1]}" for case in broken[SHOWN:]]
    return "\n".join(lines)


def check(ranks: int, count: int, number: int, folder: Path) -> None:
    drawn = cases(ranks, count, number)
    assert len(drawn) >= count
    problems = report(drawn, folder)
    assert not problems, f"random cases on {ranks} ranks that do not hold:\n{problems}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", ORDINARY)
def test_random_cases(ranks: int, tmp_path: Path) -> None:
    """Output, gradients, buffers, bytes: 500 cases."""
    check(ranks, ORDINARY[ranks], 0, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("series", range(1, FULL + 1))
@pytest.mark.parametrize("ranks", ORDINARY)
def test_more_random_cases(ranks: int, series: int, tmp_path: Path) -> None:
    """The same law, 5,000 further cases."""
    check(ranks, ORDINARY[ranks], series, tmp_path)


def test_the_cases_are_the_same_in_every_run_and_all_families_are_drawn() -> None:
    first, again = cases(4, 60, 0), cases(4, 60, 0)
    assert first == again
    assert {case.family for case in first} == set(SHARES)
    assert len({case.key for case in first}) == len(first) >= 60
    assert sum(ORDINARY.values()) >= 500


def test_a_failing_case_becomes_small() -> None:
    """The failure is pretended: kernels of more than one position in the first dim."""
    start = next(case for case in family_cases(2, "conv", 40, 7) if case.options["k"][0] > 2)
    small = shrink(start, lambda some: [case for case in some if case.options["k"][0] > 1])
    assert small.options["k"][0] == 2
    assert set(small.options["k"][1:] + small.options["s"] + small.options["d"]) <= {1}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(report([Drawn.parse(sys.argv[1])], Path(scratch)) or "holds")
