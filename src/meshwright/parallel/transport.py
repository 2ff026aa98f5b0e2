"""How pieces travel between two ranks: through shared memory where both are processes of one host, else by messages
of the backend (gloo, NCCL). `MESHWRIGHT_TRANSPORT=messages` turns shared memory off; the default is `auto`.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from weakref import WeakSet

import torch
import torch.distributed as dist

from meshwright.cluster.limits import exchange_timeout_s
from meshwright.cluster.machine import usable_cores
from meshwright.cluster.process_group import ranks_here, when_leaving
from meshwright.errors import ConfigError
from meshwright.parallel.bells import ORDERED, SPINS, Bell, new_page
from meshwright.parallel.shared import Channel

VARIABLE = "MESHWRIGHT_TRANSPORT"
MOST_NEIGHBOURS = 15  # a rank with more in a group takes messages: each costs four open files a lane, and its slots
LEAVE_S = 5.0  # a rank that is done waits so long for slower ones to read its last pieces
_living: WeakSet[Channel] = WeakSet()


def _here() -> int:
    """A number that processes share if they can open each other's files: one boot, user, set of processes, network.

    Ranks in different network namespaces are on different hosts to whoever put them there.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    spaces = [os.stat(f"/proc/self/ns/{space}").st_ino for space in ("pid", "net", "user")]
    return zlib.crc32(f"{boot} {spaces} {os.getuid()}".encode())


def _is_wanted() -> bool:
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "messages"):
        raise ConfigError(f"{VARIABLE}={value!r}: auto or messages")
    return value == "auto" and hasattr(os, "memfd_create")


@lru_cache(maxsize=1024)
def place_in(group: dist.ProcessGroup) -> tuple[int, int]:
    """This rank in the group, and the number of its ranks: torch looks both up anew, as long as a small message."""
    return dist.get_rank(group), dist.get_world_size(group)


def channels(group: dist.ProcessGroup, lane: int = 0) -> dict[int, Channel]:
    """The channels to the other ranks of a group, by rank in the group; none: messages. Collective, once a lane.

    Pieces of one lane arrive in the order they are posted in; what takes its own time uses a lane of its own.
    """
    return _channels(group, lane)


@lru_cache(maxsize=1024)
def _channels(group: dist.ProcessGroup, lane: int) -> dict[int, Channel]:
    """The handshake.

    All ranks decide alike: one that lies elsewhere, or cannot open a file of another, turns shared memory off for all.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    on_cpu = any(device.type == "cpu" for device in group._device_types)  # else there is nothing to carry, nor agree by
    if not on_cpu or not 1 < ranks <= MOST_NEIGHBOURS + 1:
        return {}
    ours: dict[int, list[int]] = {}  # per neighbour both ends of this rank's bell, and its page
    mine, found, owners = torch.zeros(2 + 2 * ranks, dtype=torch.int64), {}, set()
    try:
        if _is_wanted():
            for peer in range(ranks):
                if peer != me:
                    ours[peer] = [*os.pipe()]
                    ours[peer].append(new_page())
                    mine[2 + 2 * peer], mine[3 + 2 * peer] = ours[peer][1:]
            mine[0], mine[1] = _here(), os.getpid()
    except OSError:  # no /proc, or no more files: the others hear of it
        mine[0] = 0
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine, group=group)
    try:
        if all(int(other[0]) == int(mine[0]) != 0 for other in everyone):
            spins = _spins([int(other[1]) for other in everyone])
            for peer, (bell_in, _, page) in ours.items():
                pid, bell, theirs = (int(everyone[peer][i]) for i in (1, 2 + 2 * me, 3 + 2 * me))
                found[peer] = Channel(_answered(pid, bell, theirs, bell_in, page, spins))
                owners.add(peer)
                _living.add(found[peer])
    except OSError:
        found = {}
    agreed = torch.tensor([len(found)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    for peer, (bell_in, *given) in ours.items():
        for file in given:  # of the bell the other rank's end is the only one now: when it ends, this rank sees it
            os.close(file)
        if peer not in owners:  # a channel closes its own
            os.close(bell_in)
    return found if int(agreed) else {}


def _answered(pid: int, bell: int, theirs: int, bell_in: int, page: int, spins: int) -> Bell:
    """The bell of a neighbour whose files are `bell` and `theirs`. Raises OSError where it has ended."""
    with ExitStack() as undo:
        bell_out = os.open(f"/proc/{pid}/fd/{bell}", os.O_WRONLY | os.O_NONBLOCK)
        undo.callback(os.close, bell_out)
        opened = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
        try:
            made = Bell(pid, page, opened, bell_in, bell_out, spins)
        finally:
            os.close(opened)
        undo.pop_all()
    return made


def _spins(processes: Sequence[int]) -> int:
    """Where ranks share cores, whoever waits is to let others work. Each may have been given cores of its own."""
    cores = [os.sched_getaffinity(process) for process in processes]
    alone = len(set().union(*cores)) == sum(len(each) for each in cores)
    return SPINS if ORDERED and (alone or ranks_here() <= usable_cores()) else 0


def _leave() -> None:
    for channel in _living:
        channel.bell.hang_up()  # a neighbour that waits for a piece sees it at once
    end_s = time.monotonic() + LEAVE_S
    for channel in list(_living):
        channel.finish(end_s)
    _channels.cache_clear()  # they are kept by group
    place_in.cache_clear()


when_leaving(_leave)


def _in_child() -> None:
    """A process that a rank forks (a worker that reads data) keeps no line open: else neighbours did not see the
    rank end before the worker has."""
    for channel in list(_living):
        channel.bell.close()


os.register_at_fork(after_in_child=_in_child)


class Transfer:
    """Pieces under way between this rank and others of a group. The buffers are the caller's, and contiguous."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        sends: Sequence[tuple[int, torch.Tensor]],
        receives: Sequence[tuple[int, torch.Tensor]],
        lane: int = 0,
    ) -> None:
        """(rank in the group, tensor) each. Pieces of one rank for another arrive in the order they are posted in."""
        self._works: list[dist.Work] = []
        self._keep: list[torch.Tensor] = []  # what messages are sent from must outlive the transfer
        self._receives: list[tuple[int, torch.Tensor]] = []
        self._channels: dict[int, Channel] = {}
        either = sends or receives
        if not either:
            return
        if either[0][1].device.type == "cpu":
            self._channels = channels(group, lane)
        for peer, buffer in receives:
            if buffer.numel():
                self._receives.append((peer, buffer))
                if self._channels:
                    self._channels[peer].expect([buffer])
        if self._channels:
            for peer, piece in sends:
                if piece.numel():
                    self._channels[peer].send([piece], exchange_timeout_s)
            return
        self._keep = [piece.contiguous() for _, piece in sends if piece.numel()]
        peers = [peer for peer, piece in sends if piece.numel()]
        operations = [dist.P2POp(dist.irecv, b, group=group, group_peer=peer) for peer, b in self._receives]
        operations += [
            dist.P2POp(dist.isend, piece, group=group, group_peer=peer)
            for peer, piece in zip(peers, self._keep, strict=True)
        ]
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def is_complete(self) -> bool:
        """Whether all pieces are in their buffers; takes those that have arrived, without waiting."""
        if not self._channels:
            return all(work.is_completed() for work in self._works)
        for peer, _ in self._receives:
            self._channels[peer].take_arrived()
        self._receives = [(peer, buffer) for peer, buffer in self._receives if self._channels[peer].expects([buffer])]
        return not self._receives

    def wait(self) -> None:
        """Until all pieces are in their buffers. Raises RuntimeError when a rank is dead or late."""
        if self._channels:
            for peer, buffer in self._receives:
                self._channels[peer].receive([buffer], exchange_timeout_s)
        for work in self._works:
            work.wait()
        self._receives, self._works, self._keep = [], [], []
