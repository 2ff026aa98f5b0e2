"""Read a run directory: strict about what it finds, patient with a run that still goes or was killed.

With a `summary.json` the run has ended, and every file must be there and whole. Without one it still goes or was
killed: its logs are read up to a torn last line, which `Run.notes` tells; the files that only the end writes are not,
because in a run that was resumed they are those of its earlier end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from meshwright.errors import DataError
from meshwright.plan.plan import Plan
from meshwright.report.planes import Slices, load_slices
from meshwright.report.records import LayerRow, RankRecord, ReadingRow, Step, Summary, Validation, decode

T = TypeVar("T")
Logged = TypeVar("Logged", Step, Validation)


@dataclass(frozen=True)
class Run:
    """Everything a report shows. `summary` is None for a run that still goes or was killed."""

    path: Path
    config_text: str
    plan: Plan
    plan_text: str
    machine: dict[str, Any]
    steps: tuple[Step, ...]
    validation: tuple[Validation, ...]
    ranks: tuple[RankRecord, ...]
    reading: tuple[ReadingRow, ...]
    layers: tuple[LayerRow, ...]
    slices: Slices | None
    summary: Summary | None
    notes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.summary is not None and self.summary.finished

    @property
    def dice(self) -> tuple[float, ...]:
        """Dice of the held-out part, one per class: the final one, or the last there is (empty: none yet)."""
        if self.summary is not None:
            return self.summary.dice
        return self.validation[-1].dice if self.validation else ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a run without a summary has not written them, so they are numbered."""
        if self.summary is not None:
            return self.summary.classes
        logged = self.validation or self.steps
        return tuple(f"class {index}" for index in range(len(logged[-1].dice) if logged else 0))


def load_run(run_dir: str | Path) -> Run:
    """Read the run directory `run_dir`.

    Raises `DataError` (what, file, line, key) for a missing, truncated or malformed file, `PlanError` for the plan.
    """
    path = Path(run_dir)
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: not a run directory (no config.yaml); give the folder `meshwright train` printed")
    ended = (path / "summary.json").is_file()
    summary = decode(Summary, _json(path / "summary.json"), str(path / "summary.json")) if ended else None
    plan = Plan.load(path / "plan.yaml")
    notes: list[str] = []
    run = Run(
        path=path,
        config_text=_text(path / "config.yaml"),
        plan=plan,
        plan_text=_text(path / "plan.yaml"),
        machine=_machine(path / "machine.json", ended),
        steps=_log(Step, path / "steps.jsonl", ended, notes),
        validation=_log(Validation, path / "validation.jsonl", ended, notes),
        ranks=_rows(RankRecord, path / "ranks.json") if ended else (),
        reading=_rows(ReadingRow, path / "reading.json") if ended and (path / "reading.json").is_file() else (),
        layers=_rows(LayerRow, path / "layers.json") if ended else (),
        slices=load_slices(path / "slices.npz") if ended else None,
        summary=summary,
        notes=tuple(notes),
    )
    _agree(run)
    return run


def whole_epochs(rows: Sequence[ReadingRow]) -> list[ReadingRow]:
    """The sums over ranks, one row per epoch, with rank -1."""
    found: dict[int, ReadingRow] = {}
    for row in rows:
        total = found.get(row.epoch, ReadingRow(row.epoch, -1, 0, 0, 0))
        found[row.epoch] = replace(
            total,
            read_bytes=total.read_bytes + row.read_bytes,
            ideal_read_bytes=total.ideal_read_bytes + row.ideal_read_bytes,
            shared_bytes=total.shared_bytes + row.shared_bytes,
        )
    return list(found.values())


def _agree(run: Run) -> None:
    """Files that contradict each other are not of one run."""
    if run.ranks and [record.rank for record in run.ranks] != list(range(run.plan.ranks)):
        raise DataError(
            f"{run.path / 'ranks.json'}: has the ranks {[record.rank for record in run.ranks]}, "
            f"but plan.yaml ({run.plan}) has the ranks 0 to {run.plan.ranks - 1}"
        )
    for name, log in (("steps.jsonl", run.steps), ("validation.jsonl", run.validation)):
        for entry in log:
            if len(entry.dice) != len(run.classes):
                raise DataError(
                    f"{run.path / name}: step {entry.step} has Dice of {len(entry.dice)} classes, "
                    f"the run has {len(run.classes)}: {', '.join(run.classes)}"
                )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though the run has ended; the run directory is incomplete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}: not JSON: {error.msg}; the file is truncated or damaged"
        ) from None


def _machine(path: Path, ended: bool) -> dict[str, Any]:
    if not ended and not path.is_file():
        return {}
    raw = _json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _rows(kind: type[T], path: Path) -> tuple[T, ...]:
    raw = _json(path)
    if not isinstance(raw, list):
        raise DataError(f"{path}: expected a JSON list, found {type(raw).__name__}")
    return tuple(decode(kind, entry, f"{path}: entry {index}") for index, entry in enumerate(raw))


def _log(kind: type[Logged], path: Path, ended: bool, notes: list[str]) -> tuple[Logged, ...]:
    """One record a line, by step. A step that was run again after a resume counts once: its last record."""
    if not ended and not path.is_file():
        return ()
    lines = _text(path).split("\n")
    records: dict[int, Logged] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            if not ended and number == len(lines):  # no newline after it: the writer was cut off, or is in the middle
                notes.append(f"The last line of {path.name} (line {number}) is cut off and was left out.")
                break
            raise DataError(f"{where}: not JSON: {error.msg}") from None
        record = decode(kind, raw, where)
        records[record.step] = record
    return tuple(records[step] for step in sorted(records))
