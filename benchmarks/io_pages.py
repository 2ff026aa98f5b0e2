"""What the kernel knows of reading: the page cache, emptied file by file, and the bytes that this process has taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

COUNTERS = Path("/proc/self/io")


class Taken(NamedTuple):
    """Bytes since the process began: by system calls, and fetched from the disk for it (0 where nobody counts)."""

    calls: int
    disk: int


def taken() -> Taken:
    """Counted by the kernel, for all threads of the process."""
    try:
        lines = COUNTERS.read_text(encoding="ascii").splitlines()
    except OSError:
        return Taken(0, 0)
    known = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return Taken(known["rchar"], known["read_bytes"])


def files_below(path: Path) -> list[Path]:
    """The file, or all files in the folder."""
    return [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]


def forget(path: str | Path) -> bool:
    """Take every file below `path` out of the page cache; False where the system has no such call.

    Pages that are not on the disk yet would stay, so they are written there first; so would those that somebody maps.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files_below(Path(path)):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def is_cold(wanted: bool, path: str | Path) -> bool:
    """Empty the page cache of what lies below `path`, if that is wanted and possible."""
    return wanted and forget(path)


def said(cold: bool) -> str:
    """What a table says about the page cache."""
    if cold:
        return "page cache emptied of each file before it is read (posix_fadvise)"
    return "page cache warm: the files were just written, and it was not, or could not be, emptied"
