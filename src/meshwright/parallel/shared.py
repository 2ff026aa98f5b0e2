"""Pieces between two processes of one host through shared memory: one copy in, one copy out.

No socket, no copy by the kernel, no thread of a backend that takes a core from the computation. Nothing has a name
in the file system: a rank's memory is an anonymous file (`memfd`) and its bell a pipe, which the other rank opens
through `/proc/<pid>/fd`. So nothing stays behind when a rank is killed, only processes of the same user and host can
open it, and the end of a rank closes its pipes, which its neighbours see at once.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

SMALLEST_SLOT_BYTES = 1 << 16  # slots are powers of two from here, so that few of them serve all layers
LARGEST_KEPT_BYTES = 1 << 24  # larger slots are given back once they have been read
MOST_UNREAD = 16  # pieces that may lie unread: each is memory and an open file, and a pipe holds few tokens
MOST_LATE = 8  # of them that nobody has asked for yet: half, for a neighbour may be as far ahead
_TOKEN = struct.Struct("=iiqq")  # number of the slot, its file, its size, bytes of the piece
_ACK = struct.Struct("=i")


@dataclass
class _Slot:
    """Memory of this rank that a neighbour reads; busy from the token to its acknowledgement."""

    number: int
    file: int
    memory: torch.Tensor
    busy: bool = False


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
    """The way to and from one neighbour, process `pid`: bells and acknowledgements are ends of pipes."""

    pid: int
    bell_in: int
    bell_out: int
    ack_in: int
    ack_out: int
    _slots: list[_Slot] = field(default_factory=list)
    _made: int = 0
    _theirs: dict[int, torch.Tensor] = field(default_factory=dict)  # the neighbour's slots by number
    _expected: deque[_Expected] = field(default_factory=deque)  # in the order of the pieces to come
    _thread: int = 0  # who uses it now

    def send(self, parts: Sequence[torch.Tensor], limit_s: float) -> None:
        """Copy a piece, made of `parts` (any strides, one dtype), to shared memory and ring.

        Waits only where the neighbour is far behind.

        Raises RuntimeError when it has ended or takes nothing for `limit_s`.
        """
        self._thread = threading.get_ident()
        self._await_room(limit_s)
        nbytes = sum(part.numel() * part.element_size() for part in parts)
        slot = self._free_slot(nbytes)
        for part, place in zip(parts, _places(slot.memory, parts), strict=True):
            place.copy_(part)
        slot.busy = True
        try:
            os.write(self.bell_out, _TOKEN.pack(slot.number, slot.file, slot.memory.numel(), nbytes))
        except OSError as error:
            raise RuntimeError(f"process {self.pid} takes no more pieces ({error})") from error

    def expect(
        self,
        buffers: list[torch.Tensor],
        addends: Sequence[torch.Tensor] = (),
        fold: Callable[..., object] | None = None,
        late: bool = False,
    ) -> None:
        """The next piece but those expected is for `buffers` (contiguous): as it is, or folded with `addends`; if
        `late`, no sooner than `receive` asks for them."""
        self._thread = threading.get_ident()
        _waiting().add(self)
        self._expected.append(_Expected(buffers, addends, fold, late))

    def hang_up(self) -> None:
        """No piece follows, and none is awaited: a neighbour that waits for one sees it at once.

        Acknowledgements still come in, for a slower neighbour may be reading.
        """
        for file in (self.bell_in, self.bell_out):
            if file >= 0:
                os.close(file)
        self.bell_in = self.bell_out = -1

    def finish(self, limit_s: float) -> None:
        """Hang up, and wait for a slower neighbour to read what was sent: the memory goes with this process."""
        self.hang_up()
        end_s = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self.ack_in, select.POLLIN)
        with suppress(RuntimeError):  # it has ended
            while any(slot.busy for slot in self._slots) and poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
                self._read_acks()

    def __del__(self) -> None:
        self.hang_up()
        idle = [slot.file for slot in self._slots if not slot.busy]  # a slower neighbour may still open the others
        for file in (self.ack_in, self.ack_out, *idle):
            os.close(file)

    def receive(self, buffers: list[torch.Tensor], limit_s: float, *, apart: bool = False) -> None:
        """Wait until expected `buffers` are filled; earlier ones are filled first.

        `apart`: late ones are not asked for, they only have to make room.

        Raises RuntimeError when the neighbour has ended, sends nothing for `limit_s`, or sends another size.
        """
        while self.expects(buffers):
            if not _await(self.bell_in, limit_s):
                raise RuntimeError(f"no answer within {limit_s:g} s")
            self._take(None if apart else buffers)

    def expects(self, buffers: Sequence[torch.Tensor]) -> bool:
        """Whether `buffers` are still to be filled."""
        return any(buffers[0] is other.buffers[0] for other in self._expected)

    def take_arrived(self) -> None:
        """Fill the expected buffers whose pieces are here, without waiting for others."""
        poll = select.poll()
        poll.register(self.bell_in, select.POLLIN)
        while self.is_open and poll.poll(0):
            self._take()

    @property
    def is_open(self) -> bool:
        """Whether the next piece may be taken as soon as it is here. Late ones whose turn never came (a backward that
        failed) make room when they are many."""
        return bool(self._expected) and (not self._expected[0].late or len(self._expected) >= MOST_LATE)

    def _take(self, asked: list[torch.Tensor] | None = None) -> None:
        """Fill the first expected buffers with the piece that is here."""
        buffers, addends, fold, late = self._expected.popleft()
        if late and buffers is not asked:
            buffers[:] = [torch.empty_like(buffer) for buffer in buffers]
        token = os.read(self.bell_in, _TOKEN.size)
        if not token:
            raise RuntimeError(f"connection closed by peer: process {self.pid} has ended")
        number, file, size, nbytes = _TOKEN.unpack(token)
        wanted = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
        if nbytes != wanted:
            raise RuntimeError(f"it sent {nbytes} bytes where {wanted} were expected")
        memory = self._theirs.get(number)
        try:
            if memory is None:
                memory = _mapped(os.open(f"/proc/{self.pid}/fd/{file}", os.O_RDWR), size, close=True)
                if size <= LARGEST_KEPT_BYTES:
                    self._theirs[number] = memory
            places = _places(memory, buffers)
            if fold is None:
                for buffer, part in zip(buffers, places, strict=True):
                    buffer.copy_(part)
            else:
                for buffer, addend, part in zip(buffers, addends, places, strict=True):
                    fold(addend, part, out=buffer)
            with suppress(BrokenPipeError):  # whoever left after the last piece waits for no acknowledgement
                os.write(self.ack_out, _ACK.pack(number))
        except OSError as error:
            raise RuntimeError(f"connection closed by peer: process {self.pid} has ended ({error})") from error

    def _await_room(self, limit_s: float) -> None:
        """Until few enough pieces lie unread."""
        while sum(slot.busy for slot in self._slots) >= MOST_UNREAD:
            if not _await(self.ack_in, limit_s):
                raise RuntimeError(f"process {self.pid} took none of {MOST_UNREAD} pieces within {limit_s:g} s")
            self._read_acks()

    def _free_slot(self, nbytes: int) -> _Slot:
        self._read_acks()
        fits = [slot for slot in self._slots if not slot.busy and slot.memory.numel() >= nbytes]
        if fits:
            return min(fits, key=lambda slot: slot.memory.numel())
        size = max(SMALLEST_SLOT_BYTES, 1 << (nbytes - 1).bit_length())  # only pages that are written take memory
        file = os.memfd_create("meshwright")
        os.ftruncate(file, size)
        self._slots.append(_Slot(self._made, file, _mapped(file, size)))
        self._made += 1
        return self._slots[-1]

    def _read_acks(self) -> None:
        poll = select.poll()
        poll.register(self.ack_in, select.POLLIN)
        while poll.poll(0):
            ack = os.read(self.ack_in, _ACK.size)
            if not ack:
                raise RuntimeError(f"connection closed by peer: process {self.pid} has ended")
            slot = next(slot for slot in self._slots if slot.number == _ACK.unpack(ack)[0])
            slot.busy = False
            if slot.memory.numel() > LARGEST_KEPT_BYTES:
                self._slots.remove(slot)
                os.close(slot.file)


def _places(memory: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Where the parts of a piece lie in shared memory, one behind the other."""
    at = 0
    for part in parts:
        nbytes = part.numel() * part.element_size()
        yield memory[at : at + nbytes].view(part.dtype).view(part.shape)
        at += nbytes


_used = threading.local()


def _waiting() -> weakref.WeakSet[Channel]:
    """The channels on which this thread has expected pieces. Each thread has its own set, so none is changed by two."""
    if not hasattr(_used, "channels"):
        _used.channels = weakref.WeakSet()
    found: weakref.WeakSet[Channel] = _used.channels
    return found


def _await(file: int, limit_s: float) -> bool:
    """Until `file` can be read; whether it can, within the limit.

    What arrives meanwhile on any channel of this thread is taken: whoever sent it may be waiting for room, and the
    one waited for here may be waiting for him.
    """
    me, end_s = threading.get_ident(), time.monotonic() + limit_s
    while True:
        others = {c.bell_in: c for c in _waiting() if c.is_open and c._thread == me and c.bell_in not in (file, -1)}
        poll = select.poll()
        for each in (file, *others):
            poll.register(each, select.POLLIN)
        ready = dict(poll.poll(max(0.0, end_s - time.monotonic()) * 1000))
        if file in ready or not ready:
            return file in ready
        for each in ready:
            others[each]._take()


def _mapped(file: int, size: int, close: bool = False) -> torch.Tensor:
    memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
    if close:
        os.close(file)
    return memory
