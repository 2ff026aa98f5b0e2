"""What reading has cost since somebody last asked: for the report, by epoch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from meshwright.data.source import Field, Part, ReadStats, VolumeSource
from meshwright.errors import DataError


class Counted:
    """A source as it is, whose reads are added up. Threads may read from it at once."""

    def __init__(self, source: VolumeSource) -> None:
        self._source, self._since, self._lock = source, ReadStats(), threading.Lock()
        self.failed: tuple[int, DataError] | None = None  # the sample that could not be read last
        self.left_out: dict[int, str] = {}  # samples that nobody is to read any more, and why

    @property
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @property
    def classes(self) -> tuple[str, ...]:
        return self._source.classes

    @property
    def fields(self) -> Mapping[str, Field]:
        return self._source.fields

    def shape(self, index: int) -> tuple[int, int, int]:
        return self._source.shape(index)

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self._source.spacing_mm(index)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """As the source does."""
        try:
            part = self._source.read(index, spans)
        except DataError as error:
            self.failed = index, error
            raise
        with self._lock:
            self._since += part.stats
        return part

    def take(self) -> ReadStats:
        """The cost of all reads since the last call."""
        with self._lock:
            since, self._since = self._since, ReadStats()
        return since
