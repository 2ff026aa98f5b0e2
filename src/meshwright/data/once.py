"""Work that one rank of a host does for all of them: decode a stream that cannot be cut, measure a whole image.

The result is a file in a private folder of the local disk. Whoever comes first holds the file's lock (`flock`) while it
works, the others wait for the lock and find the file there. No rank has to come: nothing is collective, any thread may
ask in any order, and the kernel gives back the lock of a rank that dies. A rank that fails raises, and the next one
tries for itself. Once nobody uses the folder any more, whoever leaves last, or comes next, empties it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO

from meshwright.cluster.place import find_place
from meshwright.cluster.process_group import when_leaving
from meshwright.data.retry import listed, retried
from meshwright.errors import DataError

MOST_BYTES = 8 << 30  # kept in the folder; the oldest results make room
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FREE_FACTOR = 2  # a result must leave as much free as it takes


def several_ranks() -> bool:
    """Whether another rank on this host could use what this one makes."""
    return find_place(os.environ).local_ranks > 1


def identity(paths: Sequence[Path], *more: object) -> str:
    """A name for what is computed from files as they are now (of a folder: all files in it), and from `more`."""
    found = [_state(path, retried(path.stat, path)) for path in paths]
    return hashlib.blake2b(repr((found, more)).encode(), digest_size=16).hexdigest()


def _state(path: Path, now: os.stat_result) -> object:
    own = str(path), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns
    return (own, _inside(path, now.st_mtime_ns)) if stat.S_ISDIR(now.st_mode) else own


@lru_cache(maxsize=16)  # one array of many samples is asked for with each of them
def _inside(folder: Path, changed_ns: int) -> str:
    found = [_state(path, retried(path.stat, path)) for path in listed(folder)]
    return hashlib.blake2b(repr(found).encode()).hexdigest()


def found(key: str) -> BinaryIO | None:
    """The file `key`, open for reading, if somebody has written it."""
    try:
        return open(_folder() / key, "rb")
    except OSError as error:
        if error.errno not in (errno.ENOENT, *_NO_ROOM):
            raise
        return None


def once(key: str, size_bytes: int, make: Callable[[BinaryIO], None], *, wait: bool = True) -> BinaryIO | None:
    """The file `key`, open for reading, written by `make` unless it is there. It can be read as long as it is open.

    None if there is no room, or, without `wait`, if somebody else is at it. Raises what `make` raises.
    """
    try:
        return _once(key, size_bytes, make, wait=wait)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return None


def _once(key: str, size_bytes: int, make: Callable[[BinaryIO], None], *, wait: bool) -> BinaryIO | None:
    folder = _folder()
    if (there := found(key)) is not None:
        return there
    with open(folder / f"{key}.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if (there := found(key)) is not None:
            return there
        try:
            return _made(folder, key, size_bytes, make)
        finally:  # closing would not do: a child forked meanwhile has the same lock
            fcntl.flock(lock, fcntl.LOCK_UN)


def _made(folder: Path, key: str, size_bytes: int, make: Callable[[BinaryIO], None]) -> BinaryIO | None:
    """The file `key`, written now, by whoever holds its lock; None if there is no room."""
    if not _make_room(folder, size_bytes):
        return None
    partial = folder / f"{key}.partial"
    file = open(partial, "w+b")  # noqa: SIM115  the caller reads from it
    try:
        make(file)
        file.flush()
        os.replace(partial, folder / key)
    except BaseException:
        with suppress(OSError):  # closing writes what is left, onto the same full disk
            file.close()
        partial.unlink(missing_ok=True)
        raise
    return file


def _make_room(folder: Path, size_bytes: int) -> bool:
    if size_bytes > MOST_BYTES:
        return False
    kept = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another rank makes room at the same time
            if not path.suffix:
                state = path.stat()
                kept.append((state.st_mtime_ns, state.st_size, path))
    kept.sort()
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept:
        free = shutil.disk_usage(folder).free
        if total + size_bytes <= MOST_BYTES and free >= _FREE_FACTOR * size_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
    return shutil.disk_usage(folder).free >= _FREE_FACTOR * size_bytes


def _folder() -> Path:
    """The folder of this user on this host; it stays while this process lives."""
    return _held(os.getpid(), Path(tempfile.gettempdir()) / f"meshwright-{os.getuid()}")


@cache
def _held(process: int, folder: Path) -> Path:
    """Enter the folder: a shared lock says that it is in use. A forked child enters for itself."""
    _see_safe(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise DataError(f"{folder} is not a private folder of this user; remove it, or set TMPDIR to another place")
    users = open(folder / "users.lock", "ab")  # noqa: SIM115  open as long as the process
    _empty_if_unused(folder, users)
    fcntl.flock(users, fcntl.LOCK_SH)

    def leave() -> None:
        if os.getpid() == process and not users.closed:
            _held.cache_clear()
            with users:
                _empty_if_unused(folder, users)
                fcntl.flock(users, fcntl.LOCK_UN)  # closing would not do: a forked child has the same lock

    when_leaving(leave)
    atexit.register(leave)
    return folder


def _see_safe(place: Path) -> None:
    """Raise `DataError` where other users could put a folder of theirs in the place of ours: all may write to `place`,
    or to a folder above it, without the sticky bit that leaves renaming to the owner."""
    real = place.resolve()
    for folder in (real, *real.parents):
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise DataError(
                f"{folder}: everybody may write here, so others could replace what the ranks of this job share in "
                f"{place}; have its owner run chmod +t {folder}, or set TMPDIR to a folder of your own"
            )


def _empty_if_unused(folder: Path, users: BinaryIO) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    for path in folder.iterdir():
        if path.name != "users.lock":
            path.unlink(missing_ok=True)
