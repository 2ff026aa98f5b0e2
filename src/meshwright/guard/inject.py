"""Faults on demand, so that tests can break a real run: `MESHWRIGHT_FAULT=kind:rank:step`.

Kinds: `raise` (an error in the rank), `kill` (SIGKILL), `stop` (SIGSTOP: the rank stays but answers nobody),
`exit` (ends without a word), `hang` (sleeps while the others wait). Without the variable nothing ever happens.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import torch.distributed as dist

from meshwright.errors import ConfigError

VARIABLE = "MESHWRIGHT_FAULT"
KINDS = ("raise", "kill", "stop", "exit", "hang")


@dataclass(frozen=True)
class Fault:
    """What is to happen to which rank before which step."""

    kind: str
    rank: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `kind:rank:step`. Raises `ConfigError`."""
        kind, _, place = text.partition(":")
        rank, _, step = place.partition(":")
        if kind not in KINDS or not rank.isdigit() or not step.isdigit():
            raise ConfigError(f"{VARIABLE}={text!r} is not kind:rank:step with a kind of {', '.join(KINDS)}")
        return cls(kind, int(rank), int(step))


def fault_point(step: int) -> None:
    """Called by the training loop before each step; strikes when the environment asks for this rank and step."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    fault = Fault.parse(text)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if (fault.rank, fault.step) == (rank, step):
        _strike(fault)


def _strike(fault: Fault) -> None:
    if fault.kind == "raise":
        raise RuntimeError(f"fault asked for by {VARIABLE} on rank {fault.rank} before step {fault.step}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exit":
        os._exit(0)
    else:
        while True:
            time.sleep(3600)
