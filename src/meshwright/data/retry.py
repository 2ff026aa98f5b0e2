"""Reads that fail for a moment are tried again: network file systems answer late, or with a stale handle."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from meshwright.errors import DataError

T = TypeVar("T")

WAITS_S = (0.1, 1.0, 5.0)  # between attempts
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
_IN_TEXT = re.compile(r"errno = (\d+)")  # HDF5 gives the number only as text

pause: Callable[[float], None] = time.sleep


def retried(read: Callable[[], T], what: str | Path) -> T:
    """The result of `read`, called again after an `OSError` in `TRANSIENT`. `read` must start from the beginning.

    Raises `DataError` naming `what` for any other `OSError`, and when the last attempt fails too.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except OSError as error:
            if number(error) not in TRANSIENT:
                raise unreadable(error, what) from error
        pause(wait_s)
    try:
        return read()
    except OSError as error:
        raise unreadable(error, what, f" (tried {len(WAITS_S) + 1} times)") from error


def number(error: OSError) -> int | None:
    """The system's number of an error, also where a library left it in the text."""
    found = _IN_TEXT.search(str(error))
    return error.errno if error.errno is not None else int(found[1]) if found else None


def unreadable(error: OSError, what: str | Path, more: str = "") -> DataError:
    """The error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what}: no such file")
    reason = error.strerror or str(error)
    fix = "Check the file and its file system, or fetch it again."
    if isinstance(error, PermissionError):
        fix = "Let this user read it, and enter the folders above it (chmod), or run as one who may."
    return DataError(f"{what}: cannot be read{more}: {reason}. {fix}")


def listed(folder: Path) -> list[Path]:
    """What lies directly in a folder, in order. Raises `DataError`."""
    return retried(lambda: sorted(folder.iterdir()), folder)


@contextmanager
def file_errors() -> Iterator[None]:
    """Also a decorator: what the file system says meanwhile becomes a `DataError` with the path that it is about."""
    try:
        yield
    except OSError as error:
        raise unreadable(error, error.filename or "a file") from error
