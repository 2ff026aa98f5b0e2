"""Threads that read ahead, as many as it takes for reading to hide under the steps.

With `read_s` the time one thread needs for what a step reads and `step_s` the time of a step without waiting,
⌈read_s / step_s⌉ threads keep pace and one more takes up the jitter: as many as hide the transfer under the
computation, no more (the guideline of Zou et al., "Distributed training large-scale deep architectures", 2017). Both
times are measured while the job runs; the order of what is handed out never depends on the number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from meshwright.cluster.place import find_place

MOST_WORKERS = 8
SMOOTHING = 0.25  # weight of the newest step in the running means


def workers_for(read_s: float, step_s: float, most: int = MOST_WORKERS) -> int:
    """⌈read_s / step_s⌉ + 1, at least 1 and at most `most`."""
    if step_s <= 0:
        return most
    return max(1, min(most, math.ceil(min(read_s / step_s, float(most))) + 1))


def processors() -> int:
    """How many processors there are for this rank: those of the process, shared with the other ranks of the host."""
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, known // find_place(os.environ).local_ranks)


@dataclass(frozen=True)
class PipelineStats:
    """Seconds and bytes since the start, all of this rank."""

    steps: int
    wait_s: float  # that the caller waited for batches
    read_s: float  # of all threads together: from source, disk or memory
    exchange_s: float  # in the background
    sent_bytes: int
    received_bytes: int
    messages: int


@dataclass
class Pace:
    """Running means of the seconds a step takes to read and to compute."""

    read_s: float = 0.0
    step_s: float = 0.0
    _seen: tuple[bool, bool] = (False, False)

    def saw_read(self, seconds: float) -> None:
        self.read_s = seconds if not self._seen[0] else self.read_s + SMOOTHING * (seconds - self.read_s)
        self._seen = (True, self._seen[1])

    def saw_step(self, seconds: float) -> None:
        self.step_s = seconds if not self._seen[1] else self.step_s + SMOOTHING * (seconds - self.step_s)
        self._seen = (self._seen[0], True)

    @property
    def known(self) -> bool:
        return all(self._seen)


class Workers:
    """Threads that call `work()` again and again while it returns True; it returns False when it is to end.

    `work` waits by itself where there is nothing to do. More threads start at once; fewer take effect when a thread
    comes back, by `may_stay`.
    """

    def __init__(self, work: Callable[[], bool], name: str) -> None:
        self._work, self._name = work, name
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._wanted = 0

    @property
    def count(self) -> int:
        return self._wanted

    def resize(self, count: int) -> None:
        """Have `count` threads from now on."""
        with self._lock:
            self._wanted = count
            while len(self._threads) < count:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        while self._stays() and self._work():
            pass
        with self._lock:
            if threading.current_thread() in self._threads:
                self._threads.remove(threading.current_thread())

    def _stays(self) -> bool:
        with self._lock:
            if len(self._threads) <= self._wanted:
                return True
            self._threads.remove(threading.current_thread())
            return False

    def join(self, limit_s: float) -> bool:
        """Wait for all threads to end, which their `work` must let them; False if one still runs after `limit_s`."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(limit_s)
        return not any(thread.is_alive() for thread in threads)
