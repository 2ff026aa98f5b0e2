"""A local run listens on loopback and nowhere else; importing listens nowhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from socket_jobs import listening_of_the_family
from sockets import is_loopback, listening

from meshwright.cluster.launch import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/net/tcp")
RANKS = 4


def test_the_checker_tells_loopback_from_every_interface() -> None:
    assert is_loopback("0100007F:1F90")
    assert is_loopback("00000000000000000000000001000000:1F90")
    assert not is_loopback("00000000:1F90")
    assert not is_loopback("00000000000000000000000000000000:1F90")
    assert not is_loopback("0200A8C0:1F90")


def test_a_local_run_listens_on_loopback_only() -> None:
    before = set(listening(os.getpid()))
    found = launch(listening_of_the_family, RANKS, (os.getpid(),))[0]
    addresses = [address for each in found.values() for address in each]
    assert [address for address in addresses if not is_loopback(address)] == []
    assert set(found[str(os.getpid())]) - before, "the store of the caller was not seen: the check would be void"
    assert sum(bool(each) for each in found.values()) >= 1 + RANKS, "gloo of every rank listens"
    assert set(listening(os.getpid())) <= before, "nothing stays open"


IMPORT = "import os, threading, sockets, meshwright; print(sockets.listening(os.getpid()), threading.active_count())"
ALONE = (
    "import os, sockets; from meshwright.cluster.process_group import ensure_process_group as ensure; ensure(1);"
    "print(all(map(sockets.is_loopback, sockets.listening(os.getpid()))))"
)


@pytest.mark.parametrize(("code", "expected"), [(IMPORT, "[] 1"), (ALONE, "True")], ids=["import", "one rank"])
def test_a_process_alone(code: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")
