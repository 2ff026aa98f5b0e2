"""A gzip file as a stream of its decoded bytes, which goes on where it was when the file system failed for a moment.

The compressed bytes are read by position, a piece at a time, each piece as often as `retried` allows: what has been
decoded stays decoded, and the next attempt begins at the first byte that did not come. `gzip.open` would have to begin
the whole stream again, and decodes 8 KiB at a time, which takes half as long again (Python 3.11).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from meshwright.data.inflate import Inflater
from meshwright.data.retry import retried
from meshwright.errors import DataError

PIECE_BYTES = 1 << 15  # compressed bytes read at a time: they and what they decode to stay in the processor's cache


class Gunzip:
    """Decode `path` from front to back; several members behind each other are one stream, as RFC 1952 has it.

    Raises `EOFError` where the file ends inside the stream, `zlib.error` for damage (a wrong checksum included),
    `DataError` when the file cannot be read or is another one after an error.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file, self._known = -1, (0, 0, 0)
        self._at = self._decoded = 0
        self._member, self._tail = Inflater(), b""
        retried(self._open, path)

    def tell(self) -> int:
        """How many bytes have been decoded."""
        return self._decoded

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        found: list[bytes] = []
        while size:
            data = self._some(size)
            if not data:
                break
            found.append(data)
            size -= len(data)
        return found[0] if len(found) == 1 else b"".join(found)

    def skip(self, size: int) -> int:
        """Decode the next `size` bytes and drop them; returns how many there were."""
        left = size
        while left and (data := self._some(min(left, PIECE_BYTES))):
            left -= len(data)
        return size - left

    def _some(self, most: int) -> bytes:
        """Between 1 and `most` bytes; none at the end of the stream."""
        while True:
            if self._member.eof:
                self._tail = self._tail.lstrip(b"\0")  # padding between members and behind the last
                if not self._tail:
                    self._tail = self._compressed()
                    if not self._tail:
                        return b""
                    continue
                self._member = Inflater()
            fresh = self._tail or self._compressed()
            data, self._tail = self._member.decode(fresh, most)
            if data:
                self._decoded += len(data)
                return data
            if not fresh and not self._member.eof:
                raise EOFError(f"{self.path}: the file ends before its stream does")

    def _compressed(self) -> bytes:
        data = retried(self._piece, self.path)
        self._at += len(data)
        return data

    def _piece(self) -> bytes:
        self._open()
        try:
            return os.pread(self._file, PIECE_BYTES, self._at)
        except OSError:
            self.close()  # a handle may be stale: the next attempt opens the file anew
            raise

    def _open(self) -> None:
        if self._file >= 0:
            return
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        state = os.fstat(self._file)
        known = (state.st_size, state.st_mtime_ns, state.st_ino)
        if self._at and known != self._known:
            self.close()
            raise DataError(f"{self.path}: the file was replaced while it was read")
        self._known = known

    def close(self) -> None:
        """Close the file; what is read next opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Gunzip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
