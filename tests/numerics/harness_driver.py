"""Many cases in one launch: a process start costs seconds, a case milliseconds.

Every rank runs the same list and appends one line of JSON per case, so that nothing is lost when a case hangs:
the launch then ends with an error, the case it was in is marked, and the rest runs in a new launch.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import Case, Outcome, byte_limit, compare, limits, plan_of, run_parallel, run_plain

import meshwright as mw

HANG_S = 30.0  # an exchange that takes longer hangs
RELAUNCHES = 8
Key = tuple[str, str]  # case, plan


@dataclass
class Record:
    """What one rank saw of one case under one plan; `failure` is a traceback or a list of problems."""

    case: str
    plan: str
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    sent_bytes: int = 0
    limit_bytes: int = -1  # -1: not bounded
    failure: str = ""
    seconds: float = 0.0
    note: str = ""  # how the answer was found, where that is counted (programs)


def verdict(records: Sequence[Record]) -> str:
    """Empty if the case holds on all ranks, else what is wrong, with the numbers."""
    lines = [f"rank {rank}: {record.failure}" for rank, record in enumerate(records) if record.failure]
    for rank, record in enumerate(records):
        lines += [
            f"rank {rank}: {name}: error {value:.3g} > {record.limits[name]:.3g}"
            for name, value in record.errors.items()
            if not value <= record.limits.get(name, 0.0)
        ]
    sent, allowed = sum(record.sent_bytes for record in records), records[0].limit_bytes
    if 0 <= allowed < sent:
        lines.append(f"all ranks sent {sent} bytes, the closed form allows {allowed}")
    return "\n".join(lines)


def judge(case: Case, name: str, folder: Path) -> Record:
    """Run one case on this rank. The reference is plain torch in fp64, or what one rank under `parallelize` stored."""
    record = Record(case.name, name)
    plan = plan_of(name)
    if case.reference == "one":
        truth = _one_rank(case, name, folder)
        record.limits = dict.fromkeys(truth.values, case.tolerance or 1e-10)
    else:
        truth, record.limits = _one_device(case)
    ours = run_parallel(case, plan)
    record.errors = compare(ours.values, truth.values, truth.loss_scale)
    record.sent_bytes = ours.forward_bytes + ours.backward_bytes
    record.limit_bytes = byte_limit(case, plan) if case.strict else -1
    record.failure = "; ".join(ours.problems)
    return record


_last: dict[str, tuple[Outcome, dict[str, float]]] = {}  # of the case before: the meshes of one case follow each other


def _one_device(case: Case) -> tuple[Outcome, dict[str, float]]:
    """What plain torch gives, and the limits that follow."""
    if case.name not in _last:
        truth = run_plain(case, torch.float64)
        _last.clear()
        _last[case.name] = truth, limits(case, truth)
    truth, allowed = _last[case.name]
    return truth, dict(allowed)


def _one_rank(case: Case, name: str, folder: Path) -> Outcome:
    path = folder / f"{case.name}.npz"
    if name == "one":
        np.savez(path, **{key: value.numpy() for key, value in run_parallel(case, plan_of(name)).values.items()})
    with np.load(path, allow_pickle=False) as stored:
        return Outcome({key: torch.from_numpy(stored[key]) for key in stored.files})


def run_keys(lookup: Callable[[str], Any], keys: list[Key], folder: str) -> None:
    """One rank's work: every case in order, each caught. A case that fails on some ranks only, or in an exchange,
    ends the launch: the ranks are then out of step."""
    torch.set_num_threads(1)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    agreement = dist.new_group(backend="gloo") if ranks > 1 else None
    path = Path(folder) / f"rank{rank}.jsonl"
    for name, plan in keys:
        begin_s = time.monotonic()
        found = lookup(name)
        try:
            record = judge(found, plan, Path(folder)) if isinstance(found, Case) else found.judge(plan)
        except Exception:  # noqa: BLE001  a broken case is a finding, not the end of the others
            record = Record(name, plan, failure=traceback.format_exc(limit=-14))
        record.seconds = time.monotonic() - begin_s
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if agreement is not None:
            seen = torch.tensor([float(bool(record.failure)), float("ExchangeError" in record.failure)])
            dist.all_reduce(seen, group=agreement)
            failed, broken = int(seen[0]), bool(seen[1])
            if broken or 0 < failed < ranks:
                raise RuntimeError(f"the ranks are out of step after {name} under {plan}; a new launch runs the rest")


def run_all(
    worker: Callable[[list[Key], str], None], keys: Sequence[Key], ranks: int, folder: Path, hang_s: float = HANG_S
) -> dict[Key, list[Record]]:
    """Records of every rank for every case. `worker` is a module's function that calls `run_keys` with its lookup."""
    waiting, found = list(keys), dict[Key, list[Record]]()
    for _ in range(RELAUNCHES):
        for old in folder.glob("rank*.jsonl"):
            old.unlink()
        ending: mw.errors.RankError | None = None
        try:
            mw.launch(worker, ranks=ranks, args=(waiting, str(folder)), timeout_s=hang_s, threads=1)
        except mw.errors.RankError as error:
            ending = error
        by_rank = [_read(folder / f"rank{rank}.jsonl") for rank in range(ranks)]
        begun = max((len(records) for records in by_rank), default=0)
        complete = min((len(records) for records in by_rank), default=0)
        for index in range(begun):
            found[waiting[index]] = [records[index] for records in by_rank if len(records) > index]
        # the ranks leave on purpose after a case that failed; otherwise they died or hang in the next one
        on_purpose = 0 < complete == begun and any(record.failure for record in found[waiting[complete - 1]])
        if ending is not None and not on_purpose:
            if complete == len(waiting):
                raise ending  # every case came back, and yet the ranks did not end well
            key = waiting[complete]
            found.setdefault(key, []).append(Record(*key, failure=f"did not come back on all ranks: {ending}"))
            begun = max(begun, complete + 1)
        waiting = waiting[begun:]
        if not waiting:
            return found
    return found | {key: [Record(*key, failure="not run: too many cases before it hung")] for key in waiting}


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
