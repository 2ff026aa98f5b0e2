"""What the user sees while training: a live bar in a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Display:
    """Shows the steps of one run on rank 0; as a context manager it leaves the terminal in order."""

    def __init__(self, steps: int, done: int, classes: Sequence[str], *, quiet: bool = False) -> None:
        self._steps, self._first, self._classes, self._quiet = steps, done, classes, quiet
        self._started_s = time.monotonic()
        self._console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
            # drawn once a step: a thread that redraws would take time from the step
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("", total=steps, completed=done, numbers="first step …")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            sys.stdout.flush()

    def step(self, record: dict[str, Any]) -> None:
        """Show a line of `steps.jsonl`."""
        step = record["step"]
        mean_s = (time.monotonic() - self._started_s) / max(step - self._first, 1)
        numbers = (
            f"loss {record['loss']:.4f}  {self._dice(record['dice'])}  "
            f"{record['samples_per_s']:.2f} samples/s  {_clock(mean_s * (self._steps - step))} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers, refresh=True)
        else:
            self.say(f"step {step}/{self._steps}  {numbers}")

    def validation(self, record: dict[str, Any]) -> None:
        """Show a line of `validation.jsonl`."""
        self.say(f"held-out after step {record['step']}: loss {record['loss']:.4f}  {self._dice(record['dice'])}")

    def _dice(self, values: Sequence[float]) -> str:
        return "Dice " + " ".join(f"{name} {value:.3f}" for name, value in zip(self._classes, values, strict=True))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
