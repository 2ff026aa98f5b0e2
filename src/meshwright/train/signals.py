"""SIGTERM and Ctrl-C: the ranks finish the step they are in, write a checkpoint and end; nothing is torn.

A rank only notes the signal (`Noted`); the ranks then agree after the step, since a signal reaches them at different
times. The command that started local ranks passes the signal on (`passed_on`); a second one ends everything at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class Noted:
    """The number of the signal that was received last; 0: none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def noted() -> Iterator[Noted]:
    """Note SIGTERM and SIGINT instead of dying from them, while the block runs (only in the main thread)."""
    seen = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        seen.number = number

    with _handling(note):
        yield seen


@contextmanager
def passed_on() -> Iterator[Noted]:
    """Pass the first SIGTERM or SIGINT to the ranks this process has started; raise KeyboardInterrupt at the second."""
    seen = Noted()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if seen.number:
            raise KeyboardInterrupt
        seen.number = number
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
        # not print: the signal may have come in the middle of one
        os.write(2, b"\nmeshwright: stopping after this step, with a checkpoint; once more to stop at once\n")

    with _handling(pass_on):
        yield seen


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    before = {number: signal.signal(number, handler) for number in _WATCHED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
