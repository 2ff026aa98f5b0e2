"""Encode a picture as PNG: two chunks and a checksum, so no imaging library is needed."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}  # grey, RGB
_FILTER_UP = 2  # each row as the difference to the one above: smooth pictures compress about twice as well


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """`pixels` (rows, columns) grey or (rows, columns, 3) RGB as a PNG file (ISO/IEC 15948, section 11)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"expected uint8 of (rows, columns) or (rows, columns, 3), got {pixels.dtype} {pixels.shape}")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    rows, columns, channels = pixels.shape
    if channels not in _COLOUR_TYPE:
        raise ValueError(f"a picture has 1 or 3 channels, got {channels}")
    flat = pixels.reshape(rows, -1)
    above = np.vstack([np.zeros_like(flat[:1]), flat[:-1]])
    filtered = np.hstack([np.full((rows, 1), _FILTER_UP, np.uint8), flat - above])  # wraps modulo 256, as PNG wants
    header = struct.pack(">IIBBBBB", columns, rows, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """The picture inside the page: `data:image/png;base64,…`."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
