"""How two processes of one host tell each other how far they are: counters in shared memory, and a bell.

Each process has a page that its neighbour reads: how many pieces it has sent, how many of the neighbour's it has
taken, and where the last ones lie. So neither asks the system unless it has to sleep: then it says so on its page, and
the other rings, by a byte through a pipe. The pipe also tells that the other process has ended.

That a counter is seen no sooner than what it counts is a promise of x86 processors. On others every count
travels as a byte, which the system orders.
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
from contextlib import suppress

MOST_UNREAD = 16  # pieces that may lie unread: each is memory and three open files
SPINS = 10000  # looks at a counter before sleeping, some 500 µs, which most waits are shorter than
PAGE_BYTES = 4096
ORDERED = platform.machine().lower() in ("x86_64", "amd64")
_SENT, _TAKEN, _ASLEEP, _PLACES = range(4)
_WORDS = 4  # of a place: slot, file, size of the slot, bytes of the piece
_lock = threading.Lock()


def new_page() -> int:
    """An open file for the counters of one process."""
    file = os.memfd_create("meshwright")
    os.ftruncate(file, PAGE_BYTES)
    return file


def fence() -> None:
    """What this process has written is seen before it reads again: a mark before a counter, a counter before a mark.

    Taking a lock is a full barrier.
    """
    with _lock:
        pass


class Bell:
    """This process's and its neighbour's counters, and both bells. `spins`: for ranks with a core of their own."""

    def __init__(self, pid: int, mine: int, theirs: int, bell_in: int, bell_out: int, spins: int = 0) -> None:
        self.pid, self.bell_in, self.bell_out = pid, bell_in, bell_out
        self._mine, self._theirs = (memoryview(mmap.mmap(file, PAGE_BYTES)).cast("q") for file in (mine, theirs))
        self._heard = {b"s": 0, b"t": 0}
        self._spins = range(spins)
        self.sent = self.taken = 0
        self.has_ended = False
        os.set_blocking(bell_in, False)

    @property
    def arrived(self) -> int:
        """How many pieces the neighbour has sent."""
        return self._theirs[_SENT] if ORDERED else self._count(b"s")

    @property
    def unread(self) -> int:
        """How many pieces the neighbour has yet to take."""
        return self.sent - (self._theirs[_TAKEN] if ORDERED else self._count(b"t"))

    def tell_sent(self, place: tuple[int, int, int, int]) -> None:
        """One more piece lies at `place`. Raises OSError where the neighbour, asleep, has ended."""
        at = _PLACES + _WORDS * (self.sent % MOST_UNREAD)
        for word, value in enumerate(place):
            self._mine[at + word] = value
        self.sent += 1
        self._mine[_SENT] = self.sent
        self._ring(b"s")

    def place(self) -> tuple[int, ...]:
        """Where the next piece lies."""
        at = _PLACES + _WORDS * (self.taken % MOST_UNREAD)
        return tuple(self._theirs[at : at + _WORDS].tolist())

    def tell_taken(self) -> None:
        """One more piece has been read: its memory may be used again."""
        self.taken += 1
        self._mine[_TAKEN] = self.taken
        self._ring(b"t", BrokenPipeError)  # whoever left after its last piece waits for nothing

    def spin(self, for_room: bool) -> bool:
        """Look for a while whether a piece, or room for one, has come."""
        theirs, word, least = self._theirs, *((_TAKEN, self.sent - MOST_UNREAD) if for_room else (_SENT, self.taken))
        return any(theirs[word] > least for _ in self._spins)

    def sleeps(self, mark: bool) -> None:
        """Say that only the bell can wake this process, or that it is awake. Look at the counters after a `fence`."""
        self._mine[_ASLEEP] = mark

    def listen(self) -> None:
        """Take in what the bell has said."""
        with suppress(BlockingIOError):
            said = os.read(self.bell_in, PAGE_BYTES)
            self.has_ended = not said
            for kind in self._heard:
                self._heard[kind] += said.count(kind)

    def hang_up(self) -> None:
        """Nothing more is said, which the neighbour sees."""
        if self.bell_out >= 0:
            os.close(self.bell_out)
        self.bell_out = -1

    def close(self) -> None:
        """Hang up, and hear nothing more; to this process the neighbour has ended."""
        self.hang_up()
        if self.bell_in >= 0:
            os.close(self.bell_in)
        self.bell_in, self.has_ended = -1, True

    def _count(self, kind: bytes) -> int:
        if not self.has_ended:
            self.listen()
        return self._heard[kind]

    def _ring(self, kind: bytes, *harmless: type[OSError]) -> None:
        fence()
        if self.bell_out >= 0 and (self._theirs[_ASLEEP] or not ORDERED):
            # where nobody has listened for long, there is enough to wake up by
            with suppress(BlockingIOError, *harmless):
                os.write(self.bell_out, kind)
