"""What decodes gzip and zlib streams: ISA-L where it is installed (the package `isal`), else Python's own zlib.

Both give the same bytes and compare the same checksums; ISA-L needs half of the time (`benchmarks/io.py loaders`).
"""

from __future__ import annotations

import zlib
from functools import cache
from types import ModuleType
from typing import Any

GZIP = 16 + zlib.MAX_WBITS  # a header, and a checksum that is compared, of RFC 1952


@cache
def _module() -> ModuleType:
    try:
        from isal import isal_zlib as module
    except ImportError:
        return zlib
    return module


class Inflater:
    """A gzip stream, decoded piece by piece, as `zlib.decompressobj` does. Raises `zlib.error` for damage."""

    def __init__(self) -> None:
        self._stream: Any = _module().decompressobj(GZIP)

    def decode(self, data: bytes, most: int) -> tuple[bytes, bytes]:
        """At most `most` bytes, and what is left of `data`: behind the end of the stream, or for the next call."""
        try:
            found = self._stream.decompress(data, most)
        except _module().error as error:
            raise zlib.error(str(error)) from None
        return found, self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail

    @property
    def eof(self) -> bool:
        """Whether the stream has ended, and its checksum was right."""
        return bool(self._stream.eof)


def inflated(data: bytes, nbytes: int) -> bytes:
    """A whole zlib stream (RFC 1950) that decodes to about `nbytes`. Raises `zlib.error`."""
    try:
        found: bytes = _module().decompress(data, bufsize=nbytes)
    except _module().error as error:
        raise zlib.error(str(error)) from None
    return found
