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
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 16  # below this whole pages would waste more than they give back
HUGE_BYTES = 1 << 21  # of a huge page of x86-64 and of ARM with 4 KiB pages; elsewhere the advice is void


def buffer(nbytes: int) -> Tensor:
    """[nbytes] of uint8, with any content."""
    if nbytes < SMALLEST_BYTES:
        return torch.zeros(nbytes, dtype=torch.uint8)
    full = nbytes - nbytes % HUGE_BYTES  # only these: a huge page that is filled in part takes memory nobody counts
    room = nbytes if not full else full + HUGE_BYTES  # addresses, not memory: systems align what is a multiple
    pages = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if full and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE, 0, full)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of `shape`, with any content."""
    return buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Have the C library return what is free to the system, where it can (glibc's `malloc_trim`); milliseconds."""
    if _trim is not None:
        _trim(0)
