"""Memory that goes back to the system when it is freed.

Parts and batches are made in one thread and freed in another, again and again. The C library keeps what each thread
has freed for that thread's next request, and a store would take several times its budget. So the store uses pages of
its own, and has what sources have freed given back (`give_back`).

Fresh pages cost more than what is written to them: on a virtual machine 2 ms for 4 MiB in pages of 4 KiB, 0.1 ms in
pages of 2 MiB, which are asked for wherever they are full.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 16  # below this whole pages would waste more than they give back
HUGE_BYTES = 1 << 21  # of a huge page of x86-64 and of ARM with 4 KiB pages; elsewhere the advice is void
MOST_FREE = 4  # batches: one that is given away, one that is made, and those between


def buffer(nbytes: int) -> Tensor:
    """[nbytes] of uint8, with any content."""
    if nbytes < SMALLEST_BYTES:
        return torch.zeros(nbytes, dtype=torch.uint8)
    return torch.frombuffer(_pages(nbytes), dtype=torch.uint8, count=nbytes)


def _pages(nbytes: int) -> mmap.mmap:
    full = nbytes - nbytes % HUGE_BYTES  # only these: a huge page that is filled in part takes memory nobody counts
    room = nbytes if not full else full + HUGE_BYTES  # addresses, not memory: systems align what is a multiple
    pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if full and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE, 0, full)
    return pages


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of `shape`, with any content."""
    return buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


class Recycled:
    """Buffers whose pages come back when their last tensor is gone, for the next buffer of the same size.

    `room(nbytes)` says whether so many bytes more may lie here unused; where not, or beyond `MOST_FREE` of them, pages
    go back to the system at once. Thread-safe: a tensor may die in any thread, inside of any call of this class too.
    """

    def __init__(self, room: Callable[[int], bool]) -> None:
        self._room, self._lock = room, threading.Lock()
        self._free: list[tuple[int, mmap.mmap]] = []
        self.free_bytes = 0

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes] of uint8, with any content."""
        if nbytes < SMALLEST_BYTES:
            return buffer(nbytes)
        with self._lock:
            found = next((entry for entry in self._free if entry[0] == nbytes), None)
            if found is not None:
                self._free.remove(found)
                self.free_bytes -= nbytes
        pages = found[1] if found is not None else _pages(nbytes)
        array = np.frombuffer(pages, np.uint8, nbytes)  # what the tensor holds on to, and nobody else
        weakref.finalize(array, self._come_back, (nbytes, pages)).atexit = False
        return torch.from_numpy(array)

    def _come_back(self, entry: tuple[int, mmap.mmap]) -> None:
        if not self._lock.acquire(blocking=False):
            return  # perhaps this thread is in `buffer` now and its garbage was collected: let the pages go
        try:
            if len(self._free) < MOST_FREE and self._room(entry[0]):
                self._free.append(entry)
                self.free_bytes += entry[0]
        finally:
            self._lock.release()

    def drop(self) -> None:
        """Give all unused pages back to the system."""
        with self._lock:
            self._free.clear()
            self.free_bytes = 0


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Have the C library return what is free to the system, where it can (glibc's `malloc_trim`); milliseconds."""
    if _trim is not None:
        _trim(0)
