"""Parts that stay in memory once they have been read: for data of which a rank's share fits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Thread

from torch import Tensor

from meshwright.data.buffers import buffer
from meshwright.data.packing import Packing
from meshwright.data.source import Part, ReadStats, VolumeSource, Wrapped, into_of

_Key = tuple[int, tuple[tuple[int, int], ...]]


class Kept(Wrapped):
    """Reads each part once and keeps it in memory. Wraps any source.

    `hands` threads read the parts of a batch that are not there yet; more than one only of a source that several
    threads may read from. A source that can read into tensors of the caller gets those of a whole batch, so that the
    batch is there as soon as its parts are, without a copy of them.
    """

    def __init__(self, source: VolumeSource, hands: int = 1) -> None:
        super().__init__(source)
        self._hands = hands
        self._parts: dict[_Key, Part] = {}

    def fetch(self, indices: Sequence[int], spans: Sequence[slice]) -> None:
        """Read what is missing of one batch. What cannot be read stays missing: `read` tries again, and raises."""
        missing = {key: index for index in indices if (key := _key(index, spans)) not in self._parts}
        read_into = into_of(self._source)
        if len(missing) < 2 or (self._hands < 2 and read_into is None):
            return
        if read_into is None:
            reads = [partial(self._source.read, index, spans) for index in missing.values()]
        else:
            room = self._room(len(missing), spans)
            rows = [{name: tensor[row] for name, tensor in room.items()} for row in range(len(missing))]
            reads = [partial(read_into, index, spans, row) for index, row in zip(missing.values(), rows, strict=True)]
        found = _shared_out(dict(zip(missing, reads, strict=True)), self._hands)
        self._parts |= found if len(found) == len(missing) else {key: _apart(part) for key, part in found.items()}

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """As the source does; the second time the same tensors come back, to be read and not written."""
        key = _key(index, spans)
        if key not in self._parts:
            self._parts[key] = self._source.read(index, spans)
        return self._parts[key]

    @property
    def stats(self) -> ReadStats:
        """The cost of all parts that are kept."""
        return sum((part.stats for part in self._parts.values()), ReadStats())

    def _room(self, count: int, spans: Sequence[slice]) -> Mapping[str, Tensor]:
        """Fields [count, …] in one buffer."""
        packing, box = Packing(self.fields), tuple(span.stop - span.start for span in spans)
        return packing.rows(buffer(count * packing.nbytes(box)), count, box)


def _shared_out(reads: Mapping[_Key, Callable[[], Part]], hands: int) -> dict[_Key, Part]:
    """What `reads` give, without those that raise.

    This thread is one of the hands: it waits for others at the end only, so that one without a processor costs little.
    """
    left, found = deque(reads.items()), dict[_Key, Part]()

    def work() -> None:
        with suppress(IndexError):
            while True:
                key, read = left.popleft()
                with suppress(Exception):  # whoever asks for the part tries again, and is told
                    found[key] = read()

    others = [Thread(target=work, name=f"meshwright-read_{n}") for n in range(1, min(hands, len(reads)))]
    for thread in others:
        thread.start()
    try:
        work()
    finally:
        left.clear()
        for thread in others:
            thread.join()
    return found


def _apart(part: Part) -> Part:
    """In memory of its own, so that the room of a part that could not be read is free again."""
    return Part({name: tensor.clone() for name, tensor in part.items()}, part.stats)


def _key(index: int, spans: Sequence[slice]) -> _Key:
    return index, tuple((span.start, span.stop) for span in spans)
