"""Random programs on random meshes: right without a gather, right by a reported gather, or refused by name.

Never wrong, never hanging. What was gathered or refused is listed in the output and in a table under pytest's cache
(`.pytest_cache/d/programs`). A program that fails is made shorter and printed as the line that makes it again
(`python tests/numerics/test_programs.py '["d2h2", [2, 4, 5, 6, 7], [["conv", {...}], ...]]'`).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from drawn_shrink import LIMIT_S
from harness import plan_of
from harness_driver import Key, Record, run_all, verdict
from programs import GATHERED, REFUSED, Program, draw, shorter, worker

ORDINARY = {2: 90, 3: 60, 4: 120, 8: 30}
FULL = 10  # times as many
SPLIT_SHARE = 0.95  # of the programs need no gather of the whole
SHOWN = 3  # failing programs that are made shorter
ROUNDS = 12  # launches spent on one of them

Found = dict[Key, list[Record]]


def run(programs: Sequence[Program], folder: Path) -> Found:
    """Records of all ranks for each program."""
    return run_all(worker, [program.key for program in programs], plan_of(programs[0].plan).ranks, folder)


def shrink(program: Program, folder: Path) -> Program:
    """A shorter program that still fails."""
    begin_s = time.monotonic()
    for _ in range(ROUNDS):
        tried = shorter(program)
        if not tried or time.monotonic() - begin_s > LIMIT_S:
            break
        found = run(tried, folder)
        still = [one for one in tried if verdict(found[one.key])]
        if not still:
            break
        program = still[0]
    return program


def failures(programs: Sequence[Program], found: Found, folder: Path) -> str:
    """Empty if every program is right, gathered with a report, or refused by name."""
    broken = [program for program in programs if verdict(found[program.key])]
    lines = []
    for program in broken[:SHOWN]:
        small = shrink(program, folder)
        lines += [f"{small}\n{verdict(run([small], folder)[small.key])}", f"  shortened from {program}"]
    lines += [f"{program}: {verdict(found[program.key]).splitlines()[-1]}" for program in broken[SHOWN:]]
    return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """What became of one series of programs."""

    programs: list[Program]
    found: Found
    folder: Path

    def told(self) -> list[tuple[Program, str]]:
        """Programs that were gathered or refused, with the words of the rank that says most."""
        told = [
            (program, max((record.note for record in self.found[program.key]), key=len)) for program in self.programs
        ]
        assert all(note.startswith((GATHERED, REFUSED)) for _, note in told if note)
        return [(program, note) for program, note in told if note]


class Runner:
    """Runs each series once."""

    def __init__(self, tables: Path, scratch: Path) -> None:
        self.tables, self.scratch = tables, scratch
        self.done: dict[tuple[int, int], Result] = {}

    def __call__(self, ranks: int, series: int) -> Result:
        if (ranks, series) not in self.done:
            first = series * ORDINARY[ranks]
            drawn = {program.key: program for program in (draw(ranks, first + i) for i in range(ORDINARY[ranks]))}
            programs = list(drawn.values())
            folder = self.scratch / f"{ranks}-{series}"
            folder.mkdir()
            result = Result(programs, run(programs, folder), folder)
            rows = [f"| {note.replace('|', '/')} | `{program}` |" for program, note in result.told()]
            head = f"{len(programs)} programs on {ranks} ranks, {len(rows)} of them gathered or refused"
            table = "\n".join([head, "", "| how | program |", "|---|---|", *rows]) + "\n"
            (self.tables / f"ranks{ranks}-series{series}.md").write_text(table, encoding="utf-8")
            self.done[ranks, series] = result
        return self.done[ranks, series]


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    cache = getattr(request.config, "cache", None)  # pytest may run without it
    tables = cache.mkdir("programs") if cache is not None else tmp_path_factory.mktemp("tables")
    return Runner(tables, tmp_path_factory.mktemp("programs"))


def check(result: Result) -> None:
    problems = failures(result.programs, result.found, result.folder)
    assert not problems, f"programs that do not hold:\n{problems}"


def shares(runner: Runner, series: Sequence[int], capsys: pytest.CaptureFixture[str]) -> None:
    """At least `SPLIT_SHARE` of the programs neither gather nor refuse; the others are told at the terminal."""
    results = [runner(ranks, number) for number in series for ranks in ORDINARY]
    told = [entry for result in results for entry in result.told()]
    count = sum(len(result.programs) for result in results)
    with capsys.disabled():
        print("\n".join(["", *(f"  {note}\n    {program}" for program, note in told)]))
        print(f"{count} programs: {len(told)} gathered or refused (tables: {runner.tables})")
    assert len(told) <= (1 - SPLIT_SHARE) * count


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", ORDINARY)
def test_random_programs(ranks: int, runner: Runner) -> None:
    """Outputs and gradients of 300 programs: never wrong, never hanging."""
    check(runner(ranks, 0))


@pytest.mark.timeout(900)
def test_nearly_all_programs_stay_split(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    """Gathers and refusals are few; each is listed."""
    shares(runner, [0], capsys)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("series", range(1, FULL + 1))
@pytest.mark.parametrize("ranks", ORDINARY)
def test_more_random_programs(ranks: int, series: int, runner: Runner) -> None:
    """The same law, 3,000 further programs."""
    check(runner(ranks, series))


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_nearly_all_of_more_programs_stay_split(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    shares(runner, range(1, FULL + 1), capsys)


def test_programs_are_the_same_in_every_run() -> None:
    first, again = [draw(4, i) for i in range(20)], [draw(4, i) for i in range(20)]
    assert first == again
    assert len({program.key for program in first}) == 20
    assert sum(ORDINARY.values()) >= 300
    assert all(3 <= len(program.steps) <= 8 for program in first)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        one = Program.parse(sys.argv[1])
        records = run([one], Path(scratch))
        print(failures([one], records, Path(scratch)) or records[one.key][0].note or "holds")
