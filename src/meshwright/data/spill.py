"""Packed parts on local disk, when memory is full. Nothing is read back without its size and checksum.

One file a rank, which has no name from the moment it is opened: it takes no room once the process has ended, however
it ends, and nobody else can open it. A part never changes, so it is written once and stays until the end.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
import zlib
from pathlib import Path

from torch import Tensor

from meshwright.data.buffers import buffer

_HEADER = struct.Struct("=8sqqI")
_MAGIC = b"MESHWRSP"


class Spill:
    """Parts by sample number. Thread-safe. Raises `OSError` when the folder cannot be written."""

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by `close`
        self._lock = threading.Lock()
        self._places: dict[int, tuple[int, bytes]] = {}  # sample → where it starts, its header
        self._end = 0

    def __contains__(self, sample: int) -> bool:
        return sample in self._places

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return self._end

    def write(self, sample: int, packed: Tensor) -> bool:
        """Keep `packed` ([bytes] of uint8). False if the disk takes no more; then nothing is kept."""
        data = packed.numpy().data
        header = _HEADER.pack(_MAGIC, sample, len(data), zlib.crc32(data))
        with self._lock:
            start = self._end
            self._end += len(header) + len(data)
        try:
            self._write_all(header, start)
            self._write_all(data, start + len(header))
        except OSError:
            return False
        self._places[sample] = (start, header)
        return True

    def _write_all(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self.file.fileno(), view, at)
            view, at = view[done:], at + done

    def read(self, sample: int) -> Tensor | None:
        """The part, or None if it is not what was written; it is then forgotten."""
        start, header = self._places[sample]
        _, _, size, checksum = _HEADER.unpack(header)
        packed = buffer(size)
        data = packed.numpy().data
        try:
            found = os.pread(self.file.fileno(), len(header), start)
            at = 0
            while at < size:
                done = os.preadv(self.file.fileno(), [data[at:]], start + len(header) + at)
                if not done:
                    break
                at += done
        except OSError:
            at, found = 0, b""
        if found == header and at == size and zlib.crc32(data) == checksum:
            return packed
        del self._places[sample]
        return None

    def close(self) -> None:
        """Give the disk back."""
        self._places.clear()
        self.file.close()
