"""From how each rank ended to one error that names the rank and the cause."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from meshwright.cluster.message import Failed, Position
from meshwright.errors import RankError


@dataclass(frozen=True)
class Ending:
    """How one rank ended, seen by the parent. `exitcode` is None while it runs; `late`: it died after returning."""

    returned: bool
    failed: Failed | None
    exitcode: int | None
    ended_s: float | None
    position: Position | None
    pid: int | None
    started: bool
    late: bool = False

    @property
    def died(self) -> bool:
        return self.failed is None and not self.returned and self.exitcode is not None


def rank_error(endings: list[Ending], timeout_s: float) -> RankError:
    """The one error of a failed launch.

    The first of: an error that a rank raised itself, a rank that died, a rank that did not answer, a broken
    connection. The later kinds are the usual consequences of the earlier ones, whatever arrived first.
    """
    numbered = list(enumerate(endings))
    raised = [(end.failed.when_s, rank) for rank, end in numbered if end.failed and not end.failed.network]
    dead = [(end.ended_s or 0.0, rank) for rank, end in numbered if end.died or end.late]
    network = [(end.failed.when_s, rank) for rank, end in numbered if end.failed and end.failed.network]
    silent = [rank for rank, end in numbered if not end.returned and end.failed is None and end.exitcode is None]
    if raised:
        return _raised(min(raised)[1], endings)
    if dead:
        return _died(min(dead)[1], endings)
    if silent:
        return _silent(silent, endings, timeout_s)
    return _raised(min(network)[1], endings)


def _raised(rank: int, endings: list[Ending]) -> RankError:
    failed = endings[rank].failed
    assert failed is not None
    lines = [f"rank {rank} of {len(endings)} failed: {failed.headline}", "", f"Rank {rank}: {failed.trace}"]
    return RankError("\n".join(lines + _others(endings, {rank})), rank=rank, cause=failed.trace)


def _died(rank: int, endings: list[Ending]) -> RankError:
    end = endings[rank]
    code = end.exitcode
    if code is None:
        what = "returned but did not end"
    elif code < 0:
        what = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            what += " (by hand, or by the system because memory ran out)"
    else:
        what = f"ended with exit code {code} without returning"
        if not end.started:
            what += ", before its function was called (its own output says why). "
            what += "Does the main script start its work under `if __name__ == '__main__':`?"
    if end.late:
        what += ", after its function had returned"
    lines = [f"rank {rank} of {len(endings)} {what}"]
    return RankError("\n".join(lines + _others(endings, {rank})), rank=rank, cause=what)


def _silent(silent: list[int], endings: list[Ending], timeout_s: float) -> RankError:
    def guilt(rank: int) -> int:
        """A stopped process before one busy elsewhere, before one that waits in an exchange itself."""
        position = endings[rank].position
        return 0 if position is None else 1 + position.in_exchange

    first = min(silent, key=guilt)
    position = endings[first].position
    if position is not None:
        doing = f"it was at {position.line}"
    elif _is_stopped(endings[first].pid):
        doing = "it is stopped (SIGSTOP)"
    else:
        doing = "it does not react at all"
    what = f"did not answer within the {timeout_s:g} s of an exchange: {doing}"
    lines = [f"rank {first} of {len(endings)} {what}"]
    return RankError("\n".join(lines + _others(endings, {first})), rank=first, cause=what)


def _others(endings: list[Ending], told: set[int]) -> list[str]:
    """One line for each other rank: what it was doing when the job was ended."""
    lines = []
    for rank, end in enumerate(endings):
        if rank in told:
            continue
        if end.returned:
            lines.append(f"rank {rank}: had returned")
        elif end.failed is not None:
            waited = "waited for another rank at " if end.failed.network else "failed too, at "
            lines.append(f"rank {rank}: {waited}{end.failed.where}: {end.failed.headline}")
        elif end.exitcode is not None:
            lines.append(f"rank {rank}: ended with exit code {end.exitcode}")
        elif end.position is not None:
            lines.append(f"rank {rank}: was at {end.position.line}")
        else:
            lines.append(f"rank {rank}: did not react")
    return ["", "Meanwhile:", *lines] if lines else []


def _is_stopped(pid: int | None) -> bool:
    """Whether the kernel reports the process as stopped (Linux; elsewhere unknown, so False)."""
    if pid is None or sys.platform != "linux":
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in {"T", "t"}
