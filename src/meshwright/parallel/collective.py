"""Sums and gathers over a group, made of pieces that travel as `transport.py` has them travel.

Between processes of one host a sum is a reduce-scatter and an all-gather through shared memory: no thread of a
backend takes a core from the computation, and small sums, like the moments of a norm, cost microseconds. Elsewhere
the backend's own collectives are called. Summands are added in the order of the ranks, so that all ranks get the same
bits in every run; half precision is added up in fp32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from meshwright.cluster.limits import exchange_timeout_s
from meshwright.parallel.shared import Channel
from meshwright.parallel.transport import Transfer, channels, place_in
from meshwright.plan.geometry import chunk

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MOST_UNFOLDED = 8  # sums of one queue whose summands are still awaited; below bells.MOST_UNREAD
_HALF = (torch.bfloat16, torch.float16)
_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_FOLDS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def summed_bytes(nbytes: int, ranks: int) -> int:
    """What each rank sends for the sum of `nbytes`: its share to every owner, and its own sum to everybody."""
    return 2 * (ranks - 1) * nbytes // ranks


class Sum:
    """The sum (or "max", "min", "product") of `parts` over a group, under way into `results` (default: the parts).

    Parts and results are contiguous 1-D tensors of one dtype, of the same sizes on every rank. Two ranks swap all
    they have and add the other's from its memory to their own; more send each owner its chunk and get the owners'
    sums back, on `lane` of the group's channels. Parts must be left alone until `wait` returns, which leaves the sums
    in `results`. Given as `out`, these are not written before it is called: they may be the parts, which others still
    read; what had to make room is in memory of its own.
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        op: str = "sum",
        lane: int = 0,
        out: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.results = list(parts if out is None else out)
        self._group, self._op, self._lane = group, op, lane
        self._flat: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._other: Channel | None = None
        self._out: Transfer | None = None
        self._back: Transfer | None = None
        known = channels(group) if parts[0].device.type == "cpu" else {}
        self._me, ranks = place_in(group)
        if known and ranks == 2:
            self._other = known[1 - self._me]
            self._other.send(parts, exchange_timeout_s)
            # not before all of it has been sent
            self._other.expect(self.results, parts, _FOLDS[op], late=out is not None)
            return
        in_place = len(parts) == 1 and out is None
        self._flat = parts[0] if in_place else torch.cat(list(parts))
        if not known:
            self._work = dist.all_reduce(self._flat, _OPERATIONS[op], group=group, async_op=True)
            return
        spans = (chunk(self._flat.numel(), ranks, rank) for rank in range(ranks))
        self._spans = [self._flat.narrow(0, span.lo, span.size) for span in spans]
        peers = [rank for rank in range(ranks) if rank != self._me]
        self._theirs = {peer: torch.empty_like(self._spans[self._me]) for peer in peers}
        self._out = Transfer(group, [(peer, self._spans[peer]) for peer in peers], list(self._theirs.items()))

    def fold(self, wait: bool = True, *, apart: bool = False) -> bool:
        """Add up what has arrived and send it on; whether that has been done. Without `wait` only what other ranks
        wait for, and only if all is here. `apart`: results that would be written now go to memory of their own."""
        if self._other is not None:
            if wait:
                self._other.receive(self.results, exchange_timeout_s, apart=apart)
            return not self._other.expects(self.results)
        if self._out is None:
            return True
        if not (wait or self._out.is_complete()):
            return False
        self._out.wait()
        mine = self._spans[self._me]
        wide = torch.float32 if mine.dtype in _HALF else mine.dtype
        values = [self._theirs.get(rank, mine).to(wide) for rank in range(len(self._spans))]
        total = _FOLDS[self._op](values[0], values[1])
        for value in values[2:]:
            _FOLDS[self._op](total, value, out=total)
        mine.copy_(total)
        receives = [(peer, self._spans[peer]) for peer in self._theirs]
        self._back = Transfer(self._group, [(peer, mine) for peer in self._theirs], receives, self._lane)
        self._out, self._theirs = None, {}
        return True

    def is_complete(self) -> bool:
        """Whether a folded sum is here; takes of it what has arrived, without waiting."""
        if self._work is not None:
            return self._work.is_completed()
        return self._back is None or self._back.is_complete()

    def wait(self) -> None:
        """Until the results are there. Raises RuntimeError when a rank is dead or late."""
        self.fold()
        for under_way in (self._work, self._back):
            if under_way is not None:
                under_way.wait()
        if self._flat is not None and self.results[0] is not self._flat:
            sums = self._flat.split([result.numel() for result in self.results])
            for result, value in zip(self.results, sums, strict=True):
                result.copy_(value)


class Parts:
    """What each rank of a group has of some tensors, under way to all others.

    `mine` are contiguous 1-D tensors of one dtype, and so are those where the others' go: `theirs`, by rank. None of
    them may be touched until `wait` returns. For a `SumQueue` it is a sum of which nothing is folded.
    """

    def __init__(
        self, mine: Sequence[torch.Tensor], theirs: dict[int, list[torch.Tensor]], group: dist.ProcessGroup
    ) -> None:
        known = channels(group) if mine[0].device.type == "cpu" else {}
        self._theirs = theirs
        self._known = [known[peer] for peer in theirs] if known else []
        self._flat: dict[int, torch.Tensor] = {}
        self._transfer: Transfer | None = None
        if known:
            for peer, into in theirs.items():
                known[peer].expect(into)
            for channel in self._known:
                channel.send(mine, exchange_timeout_s)
            return
        flat = torch.cat(list(mine))
        self._flat = {peer: flat.new_empty(sum(t.numel() for t in into)) for peer, into in theirs.items()}
        self._transfer = Transfer(group, [(peer, flat) for peer in theirs], list(self._flat.items()))

    def fold(self, wait: bool = True, *, apart: bool = False) -> bool:
        """Take what has arrived (with `wait`: all); whether nobody waits for this rank to take more."""
        pairs = list(zip(self._known, self._theirs.values(), strict=False))
        if wait:
            for channel, into in pairs:
                channel.receive(into, exchange_timeout_s)
        return not any(channel.expects(into) for channel, into in pairs)

    def is_complete(self) -> bool:
        """Whether all parts are here, once it is folded."""
        return self._transfer is None or self._transfer.is_complete()

    def wait(self) -> None:
        """Until all parts are where they belong. Raises RuntimeError when a rank is dead or late."""
        self.fold()
        if self._transfer is None:
            return
        self._transfer.wait()
        for peer, into in self._theirs.items():
            for buffer, part in zip(into, self._flat[peer].split([t.numel() for t in into]), strict=True):
                buffer.copy_(part)


class SumQueue:
    """Sums under way one behind the other, few of them not yet folded: a rank that runs ahead waits there.

    Folding follows the order of the sums on every rank. That few are open, and that what comes back is taken each
    time, keeps the pieces that lie unread on either lane within `bells.MOST_UNREAD` (twice `MOST_UNFOLDED`), so that
    no circle of ranks waits for room with each other. So all sums of one group belong to one queue, also those whose
    results nobody wants any more: other ranks count on them.
    """

    def __init__(self) -> None:
        self.added = 0
        self._open: deque[Sum | Parts] = deque()
        self._folded: list[Sum | Parts] = []

    def add(self, total: Sum | Parts) -> None:
        """Fold what others wait for and what has waited long, take what has come back, and take in one more."""
        while self._open and self._open[0].fold(wait=len(self._open) >= MOST_UNFOLDED, apart=True):
            self._folded.append(self._open.popleft())
        self.forget()
        self._open.append(total)
        self.added += 1

    def forget(self) -> None:
        """Let go of sums that are here."""
        self._folded = [folded for folded in self._folded if not folded.is_complete()]

    def fold(self, mine: Iterable[Sum | Parts]) -> None:
        """Wait until `mine` are folded. Those of others that stand before them only make room."""
        awaited = set(mine) & set(self._open)
        while awaited:
            self._folded.append(self._open.popleft())
            self._folded[-1].fold(apart=self._folded[-1] not in awaited)
            awaited.discard(self._folded[-1])


class Gather:
    """Contiguous `local` of all ranks of a group, in their order, under way into `out` [ranks, *local.shape]."""

    def __init__(self, local: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup) -> None:
        if local.device.type != "cpu" or not channels(group):
            # as bytes: backends differ in the types they gather; a single element may keep an odd stride
            flat_in = local.as_strided((local.numel(),), (1,)).view(torch.uint8)
            self._work = _all_gather(out.view(-1).view(torch.uint8), flat_in, group=group, async_op=True)
            return
        me, rows = place_in(group)[0], out.unbind()
        peers = [rank for rank in range(len(rows)) if rank != me]
        self._work = Transfer(group, [(peer, local) for peer in peers], [(peer, rows[peer]) for peer in peers])
        rows[me].copy_(local)

    def wait(self) -> None:
        """Until `out` is whole. Raises RuntimeError when a rank is dead or late."""
        self._work.wait()
