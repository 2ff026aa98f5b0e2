"""Pieces between two processes of one host through shared memory: one copy in, one copy out.

No socket, no copy by the kernel, no thread of a backend that takes a core from the computation. Nothing has a name
in the file system: a rank's memory is an anonymous file (`memfd`) and its bell a pipe (`bells.py`), which the other
rank opens through `/proc/<pid>/fd`. So nothing stays behind when a rank is killed, only processes of the same user and
host can open it, and the end of a rank closes its pipes, which its neighbours see at once.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch

from meshwright.parallel.bells import MOST_UNREAD, Bell, fence
from meshwright.parallel.slots import Memory

_nbytes = attrgetter("nbytes")
SMALLEST_SLOT_BYTES = 1 << 16  # slots are powers of two from here, so that few of them serve all layers
LARGEST_KEPT_BYTES = 1 << 24  # larger slots are given back once they have been read
MOST_LATE = 8  # unread pieces that nobody has asked for yet: half, for a neighbour may be as far ahead
LONGEST_SLEEP_S = 0.05  # then the counters are looked at again


@dataclass
class _Slot:
    """Memory of this rank, until the neighbour has taken its `piece`."""

    number: int
    file: int
    memory: Memory
    piece: int = -1


class _Expected(NamedTuple):
    """Where a piece goes: it is copied into the buffers, or `fold(addend, part, out=buffer)` puts a result there.

    If `late`, the buffers are written when they are asked for and not before. A piece that has to make room for a
    later one goes to new memory, which takes their place in the list.
    """

    buffers: list[torch.Tensor]
    addends: Sequence[torch.Tensor]
    fold: Callable[..., object] | None
    late: bool


@dataclass(eq=False)
class Channel:
    """The way to and from one neighbour."""

    bell: Bell
    _slots: list[_Slot] = field(default_factory=list)
    _made: int = 0
    _theirs: dict[int, Memory] = field(default_factory=dict)  # the neighbour's slots by number
    _expected: deque[_Expected] = field(default_factory=deque)  # in the order of the pieces to come
    _thread: int = 0  # who uses it now
    _waits_in: weakref.WeakSet[Channel] | None = None  # that thread's `_here.channels`

    def send(self, parts: Sequence[torch.Tensor], limit_s: Callable[[], float]) -> None:
        """Copy a piece, made of `parts` (any strides, one dtype), to shared memory and say so.

        Waits only where the neighbour is far behind.

        Raises RuntimeError when it has ended or takes nothing for `limit_s()` seconds.
        """
        self._used()
        if self.bell.unread >= MOST_UNREAD and not _await(self, True, limit_s):
            raise RuntimeError(f"process {self.bell.pid} took none of {MOST_UNREAD} pieces within {limit_s():g} s")
        nbytes = sum(map(_nbytes, parts))
        slot = self._free_slot(nbytes)
        for part, place in zip(parts, slot.memory.places(parts), strict=True):
            place.copy_(part.detach() if part.requires_grad else part)  # places stay: no graph is to hang on them
        slot.piece = self.bell.sent
        try:
            self.bell.tell_sent((slot.number, slot.file, slot.memory.size, nbytes))
        except OSError as error:
            raise RuntimeError(f"process {self.bell.pid} takes no more pieces ({error})") from error

    def expect(
        self,
        buffers: list[torch.Tensor],
        addends: Sequence[torch.Tensor] = (),
        fold: Callable[..., object] | None = None,
        late: bool = False,
    ) -> None:
        """The next piece but those expected is for `buffers` (contiguous): as it is, or folded with `addends`; if
        `late`, no sooner than `receive` asks for them."""
        self._used()
        waiting = _here.channels
        if self._waits_in is not waiting:
            waiting.add(self)
            self._waits_in = waiting
        self._expected.append(_Expected(buffers, addends, fold, late))

    def finish(self, end_s: float) -> None:
        """Wait for a slower neighbour to read what was sent, for the memory goes with this process."""
        while self.bell.unread and not self.bell.has_ended and time.monotonic() < end_s:
            _sleep({self}, lambda: not self.bell.unread, end_s)

    def __del__(self) -> None:
        taken = self.bell.sent - self.bell.unread  # before the bell is closed: counts may come by it
        self.bell.close()
        for slot in self._slots:
            if slot.piece < taken:  # a slower neighbour may still open the others
                os.close(slot.file)

    def _used(self) -> None:
        """By this thread, from now on. Raises RuntimeError in a child that a rank has forked: it would write into the
        rank's memory."""
        if self.bell.bell_in < 0:
            raise RuntimeError("this process was forked from a rank, or has left: it cannot exchange with other ranks")
        self._thread = threading.get_ident()

    def receive(self, buffers: list[torch.Tensor], limit_s: Callable[[], float], *, apart: bool = False) -> None:
        """Wait until expected `buffers` are filled; earlier ones are filled first.

        `apart`: late ones are not asked for, they only have to make room.

        Raises RuntimeError when the neighbour has ended, sends nothing for `limit_s()` seconds, or sends another size.
        """
        is_open = self.expects(buffers)
        while is_open:
            if not (self.has_piece or _await(self, False, limit_s)):
                raise RuntimeError(f"no answer within {limit_s():g} s")
            is_open = self._take(None if apart else buffers) is not buffers and self.expects(buffers)

    def expects(self, buffers: Sequence[torch.Tensor]) -> bool:
        """Whether `buffers` are still to be filled."""
        first = buffers[0]
        for expected in self._expected:  # noqa: SIM110  (a generator takes longer than what it looks at)
            if expected.buffers[0] is first:
                return True
        return False

    def take_arrived(self) -> None:
        """Fill the expected buffers whose pieces are here, without waiting for others."""
        while self.is_open and self.has_piece:
            self._take()

    @property
    def has_piece(self) -> bool:
        """Whether the next piece is here."""
        return self.bell.arrived > self.bell.taken

    @property
    def is_open(self) -> bool:
        """Whether the next piece may be taken as soon as it is here. Late ones whose turn never came (a backward that
        failed) make room when they are many."""
        return bool(self._expected) and (not self._expected[0].late or len(self._expected) >= MOST_LATE)

    def _take(self, asked: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Fill the first expected buffers, which are returned, with the piece that is here."""
        buffers, addends, fold, late = self._expected.popleft()
        if late and buffers is not asked:
            buffers[:] = [torch.empty_like(buffer) for buffer in buffers]
        number, file, size, nbytes = self.bell.place()
        wanted = sum(map(_nbytes, buffers))
        if nbytes != wanted:
            raise RuntimeError(f"it sent {nbytes} bytes where {wanted} were expected")
        memory = self._theirs.get(number)
        if memory is None:
            memory = self._mapped(file, size)
            if size <= LARGEST_KEPT_BYTES:
                self._theirs[number] = memory
        places = memory.places(buffers)
        if fold is None:
            for buffer, part in zip(buffers, places, strict=True):
                buffer.copy_(part)
        else:
            for buffer, addend, part in zip(buffers, addends, places, strict=True):
                fold(addend, part, out=buffer)
        self.bell.tell_taken()
        return buffers

    def _mapped(self, file: int, size: int) -> Memory:
        """Memory of the neighbour."""
        try:
            opened = os.open(f"/proc/{self.bell.pid}/fd/{file}", os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise RuntimeError(f"Connection closed by peer: process {self.bell.pid} has ended ({error})") from error
            raise _cannot_open(error) from error
        try:
            return Memory(opened, size)
        finally:
            os.close(opened)

    def _free_slot(self, nbytes: int) -> _Slot:
        taken, found = self.bell.sent - self.bell.unread, None
        large: tuple[_Slot, ...] = ()
        for slot in self._slots:
            if slot.piece < taken:
                size = slot.memory.size
                if size > LARGEST_KEPT_BYTES:
                    large = (*large, slot)
                elif nbytes <= size and (found is None or size < found.memory.size):
                    found = slot
        for slot in large:
            self._slots.remove(slot)
            os.close(slot.file)
        if found is not None:
            return found
        size = max(SMALLEST_SLOT_BYTES, 1 << (nbytes - 1).bit_length())  # only pages that are written take memory
        try:
            file = os.memfd_create("meshwright")
            os.ftruncate(file, size)
            self._slots.append(_Slot(self._made, file, Memory(file, size)))
        except OSError as error:
            raise _cannot_open(error) from error
        self._made += 1
        return self._slots[-1]


def _cannot_open(error: OSError) -> RuntimeError:
    """This process may have no more files, or memory."""
    return RuntimeError(
        f"no shared memory for an exchange: {error}. Raise the limit of open files (ulimit -n), or set "
        "MESHWRIGHT_TRANSPORT=messages"
    )


class _Here(threading.local):
    """The channels on which this thread has expected pieces. Each thread has its own set, so none is changed by two."""

    def __init__(self) -> None:
        self.channels: weakref.WeakSet[Channel] = weakref.WeakSet()


_here = _Here()


def _await(channel: Channel, for_room: bool, limit_s: Callable[[], float]) -> bool:
    """Until `channel` has a piece, or room for one; whether that came within the limit.

    What arrives meanwhile on any channel of this thread is taken: whoever sent it may be waiting for room, and the
    one waited for here may be waiting for him. Raises RuntimeError when the neighbour has ended.
    """

    def is_here() -> bool:
        return channel.bell.unread < MOST_UNREAD if for_room else channel.has_piece

    if for_room:
        channel.take_arrived()
    if channel.bell.spin(for_room):
        return True
    me, end_s = threading.get_ident(), time.monotonic() + limit_s()
    while not is_here():
        if channel.bell.has_ended:
            raise RuntimeError(f"Connection closed by peer: process {channel.bell.pid} has ended")
        if time.monotonic() >= end_s:
            return False
        known = [c for c in _here.channels if c.is_open and c._thread == me]
        others = [c for c in known if for_room or c is not channel]
        _sleep({channel, *others}, lambda: is_here() or any(c.has_piece for c in others), end_s)  # noqa: B023
        for other in others:
            other.take_arrived()
    return True


def _sleep(channels: Iterable[Channel], is_over: Callable[[], bool], end_s: float) -> None:
    """Until one of the bells rings, but not long, and not if what is waited for is there."""
    bells = [channel.bell for channel in channels if not channel.bell.has_ended]
    for bell in bells:
        bell.sleeps(True)
    fence()
    if not is_over():
        poll = select.poll()
        for bell in bells:
            poll.register(bell.bell_in, select.POLLIN)
        poll.poll(max(0.0, min(LONGEST_SLEEP_S, end_s - time.monotonic())) * 1000)
    for bell in bells:
        bell.sleeps(False)
        bell.listen()
