"""The run directory, written by rank 0: what the report reads, and what `--resume` goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.errors import ConfigError

CONFIG, PLAN, SUMMARY = "config.yaml", "plan.yaml", "summary.json"
STEPS, VALIDATION, CHECKPOINTS = "steps.jsonl", "validation.jsonl", "checkpoints"


def default_path(parent: Path) -> Path:
    """`parent`/<date>-<time>, with a number behind it if two runs start in one second."""
    name = time.strftime("%Y%m%d-%H%M%S")
    candidates = [parent / name, *(parent / f"{name}-{number}" for number in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def newest(parent: Path) -> Path:
    """The run under `parent` that was started last. Raises `ConfigError` if there is none."""
    runs = [path.parent for path in parent.glob(f"*/{CONFIG}")]
    if not runs:
        raise ConfigError(f"--resume: there is no run in {parent}/ (a run has a {CONFIG}); name one: --resume DIR")
    return max(runs, key=lambda path: ((path / CONFIG).stat().st_mtime_ns, path.name))


def prepare(run: Path, *, resume: bool) -> None:
    """Make the directory of a new run. Raises `ConfigError` if another run is in it, or (resume) none."""
    there = (run / CONFIG).exists()
    if there and not resume:
        raise ConfigError(f"{run} already holds a run; continue it with --resume {run}, or choose another --run")
    if resume and not there:
        raise ConfigError(f"--resume {run}: no run there ({CONFIG} is missing)")
    try:
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {run}: {error.strerror}; choose another with --run") from None


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """`value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Arrays of numbers as .npz, whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill has cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def forget_after(path: Path, step: int) -> None:
    """Keep the lines of a log up to `step`: what came later is about to be computed again."""
    if path.exists():
        kept = [record for record in records(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
