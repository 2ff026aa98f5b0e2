"""`launch`: run a function on local ranks, loopback only, and return their results or one readable error."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from meshwright.cluster.failure import Ending, rank_error
from meshwright.cluster.limits import exchange_timeout_s
from meshwright.cluster.machine import usable_cores
from meshwright.cluster.message import LEAVE, WHERE, Failed, Position, Returned, Started, pack, unpack
from meshwright.cluster.place import LOOPBACK, Place, find_place
from meshwright.cluster.process_group import ensure_process_group, join_cluster, meeting_s, store_server
from meshwright.cluster.worker import InheritedFd, Job, main
from meshwright.errors import PlanError

GRACE_S = 2.0  # after the first failure, so that its cause on another rank can still arrive
DECIDED_S = 0.2  # the same when the failure already explains itself
END_S = 2.0  # between asking a rank to end (SIGTERM) and killing it
LEAVE_S = 10.0  # for ranks that returned to close their process group and run their exit handlers


def launch(
    fn: Callable[..., Any],
    ranks: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float | None = None,
    threads: int | None = None,
) -> list[Any]:
    """Run `fn(*args)` on `ranks` local processes and return their results in rank order.

    `fn` is importable, or defined in the main script (which then starts its own work under
    `if __name__ == "__main__":`). Before `fn` starts, the process group (gloo, with NCCL where each rank has a GPU)
    and `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` exist; every socket is on
    loopback. `timeout_s` limits each exchange between ranks (default: `MESHWRIGHT_TIMEOUT_S` or 120 s); `threads` per
    rank (default: `OMP_NUM_THREADS` or cores / ranks).

    Under torchrun, Slurm or OpenMPI `fn` runs in this process and its result comes back in a list of one.

    Raises `PlanError` for a wrong number of ranks or a function that cannot be sent, before anything starts;
    `RankError` when a rank raises, dies or does not answer, after all ranks have been ended.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise PlanError(f"launch(ranks={ranks!r}): the number of ranks is a whole number of at least 1")
    limit_s = exchange_timeout_s(timeout_s)
    place = find_place(os.environ)
    if place.launcher != "local" or (dist.is_initialized() and dist.get_world_size() > 1):
        if threads is not None:
            torch.set_num_threads(threads)
        return [_run_here(fn, ranks, args, place, limit_s)]
    payload = _packed(fn, tuple(args))
    store, port = store_server(LOOPBACK, 0, meeting_s(limit_s))
    job = Job(payload, ranks, port, threads or _threads_per_rank(ranks), limit_s, dict(os.environ))
    family = _Family(job)
    try:
        family.start()
        return family.results()
    finally:
        family.end()
        del store  # the ranks are gone: only now may the server go


def _run_here(fn: Callable[..., Any], ranks: int, args: Sequence[Any], place: Place, timeout_s: float) -> Any:
    """This process already is a rank."""
    if not dist.is_initialized() and place.ranks == ranks:
        join_cluster(place, timeout_s)
    ensure_process_group(ranks)
    return fn(*args)


def _packed(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """`(fn, args)` as bytes, or a `PlanError` that says why a child process could not find them."""
    name = getattr(fn, "__qualname__", repr(fn))
    script = sys.modules["__main__"]
    if getattr(fn, "__module__", None) == "__main__" and not os.path.exists(getattr(script, "__file__", None) or ""):
        raise PlanError(
            f"launch({name}): the function was typed in, ranks can only import it from a file; save it first"
        )
    try:
        return pack((fn, args))
    except Exception as error:  # pickling runs the arguments' own code
        raise PlanError(
            f"launch({name}): the function and its arguments must be sendable to another process: {error}. "
            "Use a function defined at the top level of a file (no lambda, no nested function) and plain data"
        ) from error


def _threads_per_rank(ranks: int) -> int:
    text = os.environ.get("OMP_NUM_THREADS", "")
    if text.isdigit() and int(text) > 0:
        return int(text)
    return max(1, usable_cores() // ranks)


def _context() -> ForkServerContext | SpawnContext:
    """A fork server imports torch once instead of once a rank; forking is not safe with macOS's libraries."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "meshwright.cluster.worker", "meshwright"])
    return context


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    started: bool = False
    outcome: Returned | Failed | None = None
    position: Position | None = None
    ended_s: float | None = None

    def read(self) -> None:
        """Take every message that has arrived; note the time of death when the process is gone."""
        alive = self.process.is_alive()  # before the pipe, so that nothing it sent is missed
        try:
            while self.pipe.poll():
                message = unpack(self.pipe.recv_bytes())
                if isinstance(message, Started):
                    self.started = True
                elif isinstance(message, Position):
                    self.position = message
                else:
                    self.outcome = message
        except (EOFError, OSError):
            alive = False
        if not alive and self.ended_s is None:
            self.process.join(END_S)
            self.ended_s = time.monotonic()

    @property
    def settled(self) -> bool:
        return self.outcome is not None or self.ended_s is not None

    @property
    def failed(self) -> bool:
        return self.settled and not isinstance(self.outcome, Returned)

    @property
    def explains(self) -> bool:
        """Its failure is a cause, not the echo of another rank's."""
        return self.failed and not (isinstance(self.outcome, Failed) and self.outcome.network)

    def tell(self, word: bytes) -> None:
        try:
            self.pipe.send_bytes(word)
        except OSError:
            self.read()


class _Family:
    """The ranks of one launch."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.children: list[_Child] = []

    def start(self) -> None:
        context = _context()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        output = (InheritedFd(1), InheritedFd(2))
        for rank in range(self.job.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=main, args=(rank, self.job, theirs, output), name=f"meshwright rank {rank}"
            )
            process.start()
            self.children.append(_Child(process, ours))
            theirs.close()

    def results(self) -> list[Any]:
        """Wait for all ranks. Raises `RankError` for the first failure, after a short grace for its cause to arrive."""
        deadline_s: float | None = None
        while not all(child.settled for child in self.children):
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            self._listen(left_s)
            if deadline_s is None and any(child.failed for child in self.children):
                deadline_s = time.monotonic() + GRACE_S
                for child in self.children:
                    if not child.settled:
                        child.tell(WHERE)
            if deadline_s is not None and any(child.explains for child in self.children):
                deadline_s = min(deadline_s, time.monotonic() + DECIDED_S)
        payloads = [child.outcome.payload for child in self.children if isinstance(child.outcome, Returned)]
        if len(payloads) < len(self.children):
            raise rank_error([self._ending(child) for child in self.children], self.job.timeout_s)
        self._dismiss()
        return [unpack(payload) for payload in payloads]

    def _listen(self, left_s: float | None) -> None:
        pending = [child for child in self.children if not child.settled]
        wait([item for child in pending for item in (child.pipe, child.process.sentinel)], left_s)
        for child in pending:
            child.read()

    def _dismiss(self) -> None:
        """All ranks have returned: let them close the process group, and insist that they end well."""
        for child in self.children:
            child.tell(LEAVE)
        deadline_s = time.monotonic() + LEAVE_S
        for child in self.children:
            child.process.join(max(0.0, deadline_s - time.monotonic()))
        if any(child.process.exitcode != 0 for child in self.children):
            endings = [self._ending(child, late=child.process.exitcode != 0) for child in self.children]
            raise rank_error(endings, self.job.timeout_s)

    def _ending(self, child: _Child, late: bool = False) -> Ending:
        failed = child.outcome if isinstance(child.outcome, Failed) else None
        returned = isinstance(child.outcome, Returned) and not late
        code = child.process.exitcode if not child.process.is_alive() else None
        return Ending(returned, failed, code, child.ended_s, child.position, child.process.pid, child.started, late)

    def end(self) -> None:
        """No rank outlives this call."""
        for child in self.children:
            if child.process.is_alive():
                child.process.terminate()
        deadline_s = time.monotonic() + END_S
        for child in self.children:
            child.process.join(max(0.0, deadline_s - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
            child.pipe.close()
            child.process.close()
