"""One local rank: the process that `launch` starts. Never outlives its parent, tells it how it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from types import FrameType
from typing import Any

import numpy as np
import torch

from meshwright.cluster.message import (
    LEAVE,
    WHERE,
    Failed,
    Returned,
    Started,
    describe_stack,
    headline,
    is_network,
    pack,
    unpack,
)
from meshwright.cluster.place import LOOPBACK
from meshwright.cluster.process_group import join, leave, store_client

_PR_SET_PDEATHSIG = 1


class InheritedFd:
    """A file descriptor of the parent that a child gets a copy of, whichever way the child is started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_fd, (DupFd(self.fd),)


def _received_fd(handle: Any) -> InheritedFd:
    return InheritedFd(handle.detach())


@dataclass(frozen=True)
class Job:
    """Everything a rank needs besides its number. `payload` packs `(fn, args)`."""

    payload: bytes
    ranks: int
    port: int
    threads: int
    timeout_s: float
    environment: dict[str, str]


def environment_of(rank: int, job: Job) -> dict[str, str]:
    """The variables `torch.distributed` users expect (`env://` included), and loopback for every socket."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return job.environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(job.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent hosts the store: env:// must connect, not listen
        "MESHWRIGHT_LAUNCHED": "1",
        "MESHWRIGHT_TIMEOUT_S": repr(job.timeout_s),  # for the groups that the function makes (`set_time_limit`)
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


class _Link:
    """The rank's end of the pipe. A thread answers the parent and ends the process when the parent is gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._main_thread = threading.get_ident()
        self.leave = threading.Event()
        threading.Thread(target=self._listen, name="meshwright-parent", daemon=True).start()

    def send(self, message: object) -> None:
        with self._lock:
            self._pipe.send_bytes(pack(message))

    def _listen(self) -> None:
        try:
            while True:
                word = self._pipe.recv_bytes()
                if word == LEAVE:
                    self.leave.set()
                elif word == WHERE:
                    stack: FrameType = sys._current_frames()[self._main_thread]
                    self.send(describe_stack(traceback.extract_stack(stack)))
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone; nothing that this rank computes can be used


def _die_with_parent() -> None:
    """Linux ends this process when its parent ends; elsewhere the end of the pipe does (see `_Link`)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ctrl-C reaches the whole terminal group; the parent decides and ends its ranks without a traceback each."""


def _failure(error: BaseException, what: str = "") -> Failed:
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    where = describe_stack(traceback.extract_tb(error.__traceback__)).line
    return Failed(time.monotonic(), what or headline(error), "".join(lines).rstrip(), where, is_network(error))


def _own_frames(error: BaseException) -> BaseException:
    """The error without this file's frame on top of its traceback."""
    trace = error.__traceback__
    return error.with_traceback(trace.tb_next if trace is not None and trace.tb_next is not None else trace)


def _run(rank: int, job: Job) -> Returned | Failed:
    try:
        fn, args = unpack(job.payload)
        store = store_client(LOOPBACK, job.port, job.timeout_s)
        join(store, rank, job.ranks, local_rank=rank, local_ranks=job.ranks, timeout_s=job.timeout_s)
        result = fn(*args)
    except SystemExit as error:
        return _failure(_own_frames(error), f"sys.exit({error.code!r}) before the function returned")
    except BaseException as error:  # noqa: BLE001  everything a rank can raise is reported, then the rank ends
        return _failure(_own_frames(error))
    try:
        return Returned(pack(result))
    except Exception as error:  # noqa: BLE001  pickling runs the result's own code
        return _failure(error, f"the result, a {type(result).__name__}, cannot be sent to the caller: {error}")


def main(rank: int, job: Job, pipe: Connection, output: tuple[InheritedFd, InheritedFd]) -> None:
    """Run the job's function as `rank` and report over `pipe`; ends with exit code 0 only when it returned."""
    _die_with_parent()
    signal.signal(signal.SIGINT, _ignore)
    for fd, ours in zip((1, 2), output, strict=True):
        if ours.fd != fd:  # a spawned child gets the same number, one of the fork server a copy
            os.dup2(ours.fd, fd)
            os.close(ours.fd)
    environment = environment_of(rank, job)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    np.random.seed()
    torch.set_num_threads(job.threads)
    link = _Link(pipe)
    link.send(Started())
    outcome = _run(rank, job)
    link.send(outcome)
    # A rank that closed its sockets now could cut off one that is still reading; a failed one is ended by the parent.
    link.leave.wait()
    leave()
