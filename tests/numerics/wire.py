"""What a rank really hands to its transports, counted where it is handed over and not where it is accounted for.

Pieces go through a `Channel` (shared memory) or `batch_isend_irecv`; gathers and sums through the backend's
collectives, if they are not made of pieces. Any other way out of a rank is an error while the wire is watched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.shared import Channel

OTHERS = ("all_gather", "all_to_all", "all_to_all_single", "broadcast", "gather", "reduce", "reduce_scatter", "scatter")


@dataclass
class Wire:
    """Bytes of each piece, of each gather (once for each other rank), and of each sum: (bytes, ranks)."""

    pieces: list[int] = field(default_factory=list)
    gathers: list[int] = field(default_factory=list)
    sums: list[tuple[int, int]] = field(default_factory=list)

    def taken(self) -> Wire:
        """What was counted since this was last asked."""
        found = Wire(self.pieces, self.gathers, self.sums)
        self.pieces, self.gathers, self.sums = [], [], []
        return found


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _refuse(name: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"dist.{name} is no way that the wire knows")

    return refuse


@contextmanager
def watched() -> Iterator[Wire]:
    """Everything this rank sends while inside."""
    wire = Wire()
    send, batch, reduce = Channel.send, dist.batch_isend_irecv, dist.all_reduce

    def piece(channel: Channel, parts: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        wire.pieces.append(sum(map(_nbytes, parts)))
        send(channel, parts, *args, **kwargs)

    def messages(operations: Any) -> Any:
        wire.pieces += [_nbytes(o.tensor) for o in operations if o.op is dist.isend]
        return batch(operations)

    def summed(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        wire.sums.append((_nbytes(tensor), dist.get_world_size(group)))
        return reduce(tensor, *args, group=group, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Channel, "send", piece))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", messages))
        stack.enter_context(mock.patch.object(dist, "all_reduce", summed))
        for name in OTHERS:
            stack.enter_context(mock.patch.object(dist, name, _refuse(name)))
        for module in [m for name, m in sys.modules.items() if name.startswith("meshwright.parallel")]:
            if hasattr(module, "_all_gather"):  # whichever module holds the backend's gather
                stack.enter_context(mock.patch.object(module, "_all_gather", _gather(wire, module._all_gather)))
        yield wire


def _gather(wire: Wire, gather: Callable[..., Any]) -> Callable[..., Any]:
    def gathered(out: Tensor, local: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        wire.gathers += [_nbytes(local)] * (dist.get_world_size(group) - 1)
        return gather(out, local, *args, group=group, **kwargs)

    return gathered
