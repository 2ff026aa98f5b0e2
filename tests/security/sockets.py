"""Which addresses a process listens on, read from the kernel's table (Linux)."""

from __future__ import annotations

import os
import re
from pathlib import Path

LISTEN = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening(pid: int) -> list[str]:
    """Kernel notation `ADDRESS:PORT` of every TCP socket, IPv4 and IPv6, on which process `pid` listens."""
    inodes = _socket_inodes(pid)
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == LISTEN and row[9] in inodes]


def is_loopback(address: str) -> bool:
    return address.partition(":")[0] in LOOPBACK


def _socket_inodes(pid: int) -> set[str]:
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue  # the descriptor with which this directory is read
    return {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
