"""Memory that is freed stays with the process, where there is enough of it: fresh pages cost a step on a CPU a fifth.

glibc gives large blocks back to the system when they are freed and takes fresh, zeroed pages for the next step. It can
be told not to, which takes some more memory, for blocks lie less tightly. So it is decided after the first step, when
the process knows its need: only if as much again is free for every rank of this host. `MESHWRIGHT_PAGES` is `auto`
(so), `keep` or `return`; whoever sets glibc's own variables has decided, too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from meshwright.cluster.machine import available_bytes, peak_bytes
from meshwright.cluster.process_group import ranks_here
from meshwright.errors import ConfigError

VARIABLE = "MESHWRIGHT_PAGES"
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt(3)
NEVER = -1  # bytes at the end of the heap from which they are given back: none
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def wanted() -> str:
    """What the user said: `auto`, `keep` or `return`. Raises `ConfigError` for anything else."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "keep", "return"):
        raise ConfigError(f"{VARIABLE}={value!r}: set it to auto, keep or return")
    return value


def keep_pages() -> bool:
    """Keep freed pages from now on, if that is wanted and there is room; whether it is so."""
    value = wanted()
    if value == "return" or (value == "auto" and (any(name in os.environ for name in _OWN) or not _has_room())):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, NEVER))


def _has_room() -> bool:
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    return 0 < peak_bytes() * ranks_here() <= available_bytes()
