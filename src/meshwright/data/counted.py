"""What reading has cost since somebody last asked: for the report, by epoch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from meshwright.data.source import Part, ReadStats, VolumeSource, Wrapped
from meshwright.errors import DataError


class Counted(Wrapped):
    """A source as it is, whose reads are added up. Threads may read from it at once."""

    def __init__(self, source: VolumeSource) -> None:
        super().__init__(source)
        self._since, self._lock = ReadStats(), threading.Lock()
        self._failed: dict[int, DataError] = {}  # what was raised last for each sample that could not be read
        self.left_out: dict[int, str] = {}  # samples that nobody is to read any more, and why

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """As the source does; `DataError` at once for a sample that is left out."""
        try:
            if index in self.left_out:
                raise DataError(self.left_out[index])
            part = self._source.read(index, spans)
        except DataError as error:
            self._failed[index] = error
            raise
        self.add(part.stats)
        return part

    def add(self, stats: ReadStats) -> None:
        """Count what was read beside the parts."""
        with self._lock:
            self._since += stats

    def blamed(self, error: BaseException | None) -> int:
        """The sample that could not be read, if `error` or what caused it says just this; else -1."""
        while error is not None:
            found = next((index for index, known in list(self._failed.items()) if known is error), None)
            if found is not None:
                return found
            error = error.__cause__
        return -1

    def take(self) -> ReadStats:
        """The cost of all reads since the last call."""
        with self._lock:
            since, self._since = self._since, ReadStats()
        return since
