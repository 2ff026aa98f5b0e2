"""An index of a folder: every file of it with its length and a checksum, as JSON beside the data.

Where there is one, missing files and wrong lengths are found before work starts (a lost Zarr chunk too, which the
format itself cannot notice); `meshwright data index FOLDER --check` reads everything again and compares the checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from meshwright.data.formats import ENDINGS, ZARR, ending
from meshwright.data.retry import file_errors, listed, retried
from meshwright.errors import DataError

INDEX = "meshwright-index.json"
VERSION = 1
_PARTIAL = ".meshwright-index.partial"
_BLOCK_BYTES = 1 << 20


class Entry(NamedTuple):
    """A file: its length and the BLAKE2b digest (16 bytes, in hexadecimal) of its contents."""

    size_bytes: int
    digest: str


@file_errors()
def data_files(folder: Path) -> list[str]:
    """The data files below a folder, as relative paths in order; inside Zarr folders every file."""

    def walk(path: Path, zarr: bool) -> Iterator[Path]:
        for child in listed(path):
            if child.name.startswith(".") and not zarr:
                continue
            if child.is_dir():
                yield from walk(child, zarr or ending(child.name) in ZARR)
            elif zarr or ending(child.name) in ENDINGS:
                yield child

    inside_zarr = ending(folder.name) in ZARR
    return [path.relative_to(folder).as_posix() for path in walk(folder, inside_zarr) if path.name != INDEX]


def digest(path: Path) -> Entry:
    """Length and checksum of a file, a MiB at a time. Raises `DataError`."""

    def once() -> Entry:
        found, size = hashlib.blake2b(digest_size=16), 0
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                found.update(block)
                size += len(block)
        return Entry(size, found.hexdigest())

    return retried(once, path)


def write_index(folder: Path, done: Callable[[int], None] = lambda size: None, workers: int = 2) -> int:
    """Write the index of `folder`; the number of files. `done` hears the bytes of each file that is finished.

    Each finished file is noted at once, so that a call after a kill goes on where it was: a file that has its length
    and time of change since then is not read again. Raises `DataError`.
    """
    names, known = data_files(folder), _noted(folder)
    if not names:
        raise DataError(f"{folder}: no data files to index; known endings: {', '.join(ENDINGS)}")
    try:
        return _written(folder, names, known, done, workers)
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written: {error.strerror or error}. Make room there, or the folder writable"
        ) from None


def _written(
    folder: Path,
    names: list[str],
    known: dict[str, tuple[int, int, Entry]],
    done: Callable[[int], None],
    workers: int,
) -> int:
    found: dict[str, Entry] = {}
    with open(folder / _PARTIAL, "a", encoding="utf-8") as notes, ThreadPoolExecutor(workers) as pool:

        def one(name: str) -> tuple[str, int, Entry]:
            state = (folder / name).stat()
            size, changed_ns, entry = known.get(name, (-1, -1, Entry(0, "")))
            if (size, changed_ns) != (state.st_size, state.st_mtime_ns):
                entry = digest(folder / name)
            return name, state.st_mtime_ns, entry

        for name, changed_ns, entry in pool.map(one, names):
            found[name] = entry
            if name not in known:
                notes.write(json.dumps([name, entry.size_bytes, changed_ns, entry.digest]) + "\n")
                notes.flush()
            done(entry.size_bytes)
    raw = {"meshwright_index": VERSION, "files": {name: list(entry) for name, entry in found.items()}}
    temporary = folder / f".{INDEX}.{os.getpid()}"
    temporary.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INDEX)
    (folder / _PARTIAL).unlink()
    return len(found)


def _noted(folder: Path) -> dict[str, tuple[int, int, Entry]]:
    """What an earlier call has finished: name → length, time of change, entry. Torn lines are left out."""
    found: dict[str, tuple[int, int, Entry]] = {}
    if (folder / _PARTIAL).exists():
        for line in (folder / _PARTIAL).read_text(encoding="utf-8").split("\n")[:-1]:
            with suppress(ValueError):  # torn, and gone on with behind it
                name, size, changed_ns, text = json.loads(line)
                found[name] = (size, changed_ns, Entry(size, text))
    return found


def read_index(folder: Path) -> dict[str, Entry] | None:
    """The index of a folder; None if it has none. Raises `DataError` for one that is damaged."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        raw: Any = json.loads(retried(lambda: path.read_text(encoding="utf-8"), path))
        if raw["meshwright_index"] != VERSION:
            raise DataError(
                f"{path}: version {raw['meshwright_index']!r}; this release reads {VERSION}; write it again"
            )
        return {str(name): Entry(int(size), str(text)) for name, (size, text) in raw["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged: {error!r}; write it again: meshwright data index {folder}") from None


def see_lengths(folder: Path, inside: Path) -> None:
    """If the folder has an index, raise `DataError` unless the file `inside`, or all files of that Zarr folder, are as
    long as it says. Files that it does not name pass."""
    index, order = _lengths(folder, (folder / INDEX).stat().st_mtime_ns if (folder / INDEX).is_file() else None)
    own = inside.relative_to(folder).as_posix() if inside.is_relative_to(folder) else ""
    names = [own] if own in index else order
    if names is order and own != ".":  # what begins with "own/"; the character after "/" is "0"
        names = order[bisect_left(order, f"{own}/") : bisect_left(order, f"{own}0")]
    for name in names:
        path, expected = folder / name, index[name]
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            state = "it is missing" if size is None else f"it has {size} bytes"
            raise DataError(
                f"{path}: {state}; the index {folder / INDEX} says {expected} bytes. Fetch the file again, or write "
                f"the index again: meshwright data index {folder}"
            )


def missing_file(folder: Path) -> str | None:
    """What to say of the first file of the folder's index (of a Zarr folder: of the whole folder) that is not there.

    Files that a sample consists of are looked at with it; a sample of which nothing is left nobody would miss.
    """
    _, order = _lengths(folder, (folder / INDEX).stat().st_mtime_ns if (folder / INDEX).is_file() else None)
    whole = dict.fromkeys(_outermost(name) for name in order)
    gone = [name for name in whole if not (folder / name).exists()]
    if not gone:
        return None
    return (
        f"{folder / gone[0]}: it is missing, and {len(gone) - 1} more of the {len(whole)} in {folder / INDEX}. Fetch "
        f"it again, or write the index again: meshwright data index {folder}"
    )


def _outermost(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[: next((at for at, part in enumerate(parts, 1) if ending(part) in ZARR), len(parts))])


@lru_cache(maxsize=4)
def _lengths(folder: Path, changed_ns: int | None) -> tuple[dict[str, int], list[str]]:
    """The lengths of the index and its names in order, read once while it stays as it is."""
    lengths = {name: entry.size_bytes for name, entry in (read_index(folder) or {}).items()}
    return lengths, sorted(lengths)


def differences(folder: Path, done: Callable[[int], None] = lambda size: None, workers: int = 2) -> list[str]:
    """Every file that is not as the index says, and why; reads all of them. Raises `DataError` without an index."""
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: no {INDEX} to compare with; write it: meshwright data index {folder}")

    def one(name: str) -> str | None:
        entry, path = index[name], folder / name
        if not path.is_file():
            return f"{name}: missing"
        found = digest(path)
        done(found.size_bytes)
        if found.size_bytes != entry.size_bytes:
            return f"{name}: {found.size_bytes} bytes instead of {entry.size_bytes}"
        return None if found == entry else f"{name}: other contents (checksum {found.digest} instead of {entry.digest})"

    with ThreadPoolExecutor(workers) as pool:
        wrong = [text for text in pool.map(one, index) if text is not None]
    return wrong + [f"{name}: not in the index" for name in data_files(folder) if name not in index]
