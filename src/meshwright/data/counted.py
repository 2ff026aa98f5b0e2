"""What reading has cost since somebody last asked: for the report, by epoch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

from meshwright.data.source import Part, ReadInto, ReadStats, VolumeSource, Wrapped, into_of
from meshwright.errors import DataError


class Counted(Wrapped):
    """A source as it is, whose reads are added up. Threads may read from it at once."""

    def __init__(self, source: VolumeSource) -> None:
        super().__init__(source)
        self._since, self._lock = ReadStats(), threading.Lock()
        # the sample that could not be read, for each error that somebody may still ask about
        self._failed: WeakKeyDictionary[BaseException, int] = WeakKeyDictionary()
        self.left_out: dict[int, str] = {}  # samples that nobody is to read any more, and why

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """As the source does; `DataError` at once for a sample that is left out."""
        return self._counted(index, partial(self._source.read, index, spans))

    @property
    def read_into(self) -> ReadInto | None:
        """As the source has it, counted."""
        into = into_of(self._source)
        if into is None:
            return None
        return lambda index, spans, room: self._counted(index, partial(into, index, spans, room))

    def _counted(self, index: int, read: Callable[[], Part]) -> Part:
        with self.blaming(index):
            part = read()
        self.add(part.stats)
        return part

    @contextmanager
    def blaming(self, index: int) -> Iterator[None]:
        """For whatever is read of sample `index`: a `DataError` is its fault, and comes at once if it is left out."""
        try:
            if index in self.left_out:
                raise DataError(self.left_out[index])
            yield
        except DataError as error:
            with self._lock:
                self._failed[error] = index
            raise

    def add(self, stats: ReadStats) -> None:
        """Count what was read beside the parts."""
        with self._lock:
            self._since += stats

    def blamed(self, error: BaseException | None) -> int:
        """The sample that could not be read, if `error` or what caused it says just this; else -1."""
        while error is not None:
            with self._lock:
                found = self._failed.get(error)
            if found is not None:
                return found
            error = error.__cause__
        return -1

    def take(self) -> ReadStats:
        """The cost of all reads since the last call."""
        with self._lock:
            since, self._since = self._since, ReadStats()
        return since
