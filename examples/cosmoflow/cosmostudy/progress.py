"""What the user sees of a training: a line now and then, wherever the output goes."""

from __future__ import annotations

import time
from typing import Any

EVERY_S = 15.0


class Progress:
    """Says at most every `EVERY_S` seconds how far one training is. `about` begins each line."""

    def __init__(self, about: str, done: int, steps: int, *, quiet: bool = False) -> None:
        self._about, self._first, self._steps, self._quiet = about, done, steps, quiet
        self._started_s = self._said_s = time.monotonic()
        self._losses: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        """Hear of a step; speaks if it is time, and at the last one."""
        if self._quiet:
            return
        now_s, step = time.monotonic(), record["step"]
        self._losses.append(record["loss"])
        if now_s - self._said_s < EVERY_S and step < self._steps:
            return
        each_s = (now_s - self._started_s) / (step - self._first)
        loss = sum(self._losses) / len(self._losses)
        left = clock(each_s * (self._steps - step))
        print(
            f"{self._about}: step {step}/{self._steps}, loss {loss:.4f}, {each_s:.2f} s a step, {left} left", flush=True
        )
        self._said_s, self._losses = now_s, []


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
