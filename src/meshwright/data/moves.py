"""Sub-volumes between ranks: one message from rank to rank and step, through a process group of the store's own.

The moves of a step are known on both sides (`owners`), the fields too (`packing`), so a message is a short head and
the packed pieces in the order of the batch. Its head says whether the sender could read what it keeps: a rank that
could not says so instead of falling silent. One thread only may use an `Exchange`; all ranks make it together.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.data.buffers import buffer
from meshwright.data.owners import Piece, sizes
from meshwright.data.packing import Packing
from meshwright.errors import DataError, ExchangeError
from meshwright.parallel.transport import channels

HEAD_BYTES = 512  # what a message is, and room for the text of an error
_HEAD = struct.Struct("=8sqqq")
_MAGIC = b"MESHWRMV"
CHUNK_BYTES = 1 << 19  # of a message at a time through shared memory
FINE, FAILED, CLOSED = 0, 1, 2


def message_bytes(packing: Packing, pieces: Sequence[Piece]) -> int:
    """The whole size of the message that carries `pieces`; 0 if nothing is to be carried."""
    payload = sum(packing.nbytes(sizes(piece.box)) for piece in pieces)
    return payload and HEAD_BYTES + payload


def by_peer(pieces: Sequence[Piece], rank: int, packing: Packing) -> dict[int, list[Piece]]:
    """The pieces to or from each other rank that take part in a message, ranks in order, pieces as in the batch."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        peer = piece.source if piece.target == rank else piece.target
        if peer != rank and packing.nbytes(sizes(piece.box)):
            found.setdefault(peer, []).append(piece)
    return dict(sorted(found.items()))


def write(packing: Packing, pieces: Sequence[Piece], step: int, parts: Sequence[Tensor]) -> Tensor:
    """The message of `pieces`, packed each as in `parts`."""
    message = buffer(message_bytes(packing, pieces))
    _set_head(message, FINE, step, "")
    torch.cat(list(parts), out=message[HEAD_BYTES:])
    return message


def excuse(packing: Packing, pieces: Sequence[Piece], step: int, status: int, text: str) -> Tensor:
    """A message of the size that is expected, which says why it does not carry `pieces`."""
    message = buffer(message_bytes(packing, pieces))
    _set_head(message, status, step, text)
    return message


def _set_head(message: Tensor, status: int, step: int, text: str) -> None:
    room = HEAD_BYTES - _HEAD.size
    words = text.encode()[:room].decode(errors="ignore").encode().ljust(room, b"\0")
    head = _HEAD.pack(_MAGIC, status, step, message.numel()) + words
    message[:HEAD_BYTES] = torch.frombuffer(bytearray(head), dtype=torch.uint8)


def read(packing: Packing, pieces: Sequence[Piece], step: int, message: Tensor, where: str) -> list[Tensor]:
    """The packed pieces inside a message, without a copy.

    Raises `DataError` with the sender's reason, `ExchangeError` when it has closed or is at another step.
    """
    head = bytes(message[:HEAD_BYTES].numpy())
    magic, status, found, size = _HEAD.unpack_from(head)
    words = head[_HEAD.size :].rstrip(b"\0").decode()
    if magic != _MAGIC or (found, size) != (step, message.numel()):
        raise ExchangeError(f"{where}: it is at step {found}; all ranks must ask for the same steps")
    if status == FAILED:
        raise DataError(f"{where}: {words}")
    if status == CLOSED:
        raise ExchangeError(f"{where}: it has closed its store: {words}")
    parts, at = [], HEAD_BYTES
    for piece in pieces:
        parts.append(message[at : at + packing.nbytes(sizes(piece.box))])
        at += parts[-1].numel()
    return parts


class Exchange:
    """A group, or shared memory, between the ranks of a circle (`Owners.circles`). Collective over all ranks."""

    def __init__(self, circles: Sequence[Sequence[int]], rank: int, timeout_s: float) -> None:
        self._timeout_s, self._failed = timeout_s, False
        self._circle = next(tuple(circle) for circle in circles if rank in circle)
        limit = timedelta(seconds=timeout_s)
        made = {tuple(circle): dist.new_group(list(circle), timeout=limit, backend="gloo") for circle in circles}
        self._group: dist.ProcessGroup | None = made[self._circle]
        self._channels = channels(self._group)  # here, where all ranks come by, and for this object alone

    def swap(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """Send a message to and receive one from each of the ranks named; returns when all have arrived.

        Through shared memory messages go in chunks, all ranks taking their next one before they send another: what lies
        unread stays small, and no ring of ranks can wait for each other. Raises `ExchangeError` when a rank has ended
        or gives nothing within the time limit.
        """
        to = [(self._circle.index(peer), message) for peer, message in sorted(sends.items())]
        into = [(self._circle.index(peer), room) for peer, room in sorted(receives.items())]
        peers = [peer for peer, _ in (*to, *into)]
        if not peers:
            return
        peer = peers[0]
        try:
            if self._channels:
                for at in range(0, max(message.numel() for _, message in (*to, *into)), CHUNK_BYTES):
                    span = slice(at, at + CHUNK_BYTES)
                    awaited = [(peer, room[span]) for peer, room in into if at < room.numel()]
                    for peer, room in awaited:
                        self._channels[peer].expect([room])
                    for peer, message in to:
                        if at < message.numel():
                            self._channels[peer].send([message[span]], lambda: self._timeout_s)
                    for peer, room in awaited:
                        self._channels[peer].receive([room], lambda: self._timeout_s)
                return
            posted = [dist.P2POp(dist.irecv, room, group=self._group, group_peer=p) for p, room in into]
            posted += [dist.P2POp(dist.isend, message, group=self._group, group_peer=p) for p, message in to]
            for peer, work in zip([p for p, _ in (*into, *to)], dist.batch_isend_irecv(posted), strict=True):  # noqa: B007
                work.wait()
        except RuntimeError as error:
            self._failed = True
            raise ExchangeError(f"rank {self._circle[peer]} does not answer: {error}") from error

    def hang_up(self) -> None:
        """No message comes after the last one: a rank that waits for another sees it at once, where memory is shared.

        Acknowledgements still come in, for a slower rank may be reading. The group is let go of: before the process
        groups are closed no thread may hold one.
        """
        if not self._failed:  # after a failure pieces may still be expected there
            for channel in self._channels.values():
                channel.bell.hang_up()
        self._group, self._channels = None, {}
