"""What the rules for pooling, resizing and padding share: windows of split dims, and results without elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause
from meshwright.parallel.exchange import Line, fetch
from meshwright.parallel.functions import cause_for, placements_of
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import Placements, axis_of, local_shape
from meshwright.parallel.parts import from_local, to_local
from meshwright.plan.geometry import Interval, chunks


@dataclass(frozen=True)
class Space:
    """Where a mesh tensor lies, for a rule that computes on its local part."""

    mesh: DeviceMesh
    placements: Placements
    shape: tuple[int, ...]
    cause: Cause
    memory: int = 0  # of the part of the input, where a result may lie in it

    def line(self, dim: int) -> Line | None:
        """The ranks that share `dim`, or None where it is whole."""
        axis = axis_of(self.placements, dim)
        return None if axis is None else Line(self.mesh, axis, dim, self.cause)

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """This rank's part of a result of global `shape` with the same splits."""
        return local_shape(self.mesh, self.placements, tuple(shape))

    def done(self, local: torch.Tensor, shape: Sequence[int]) -> Any:
        """The mesh tensor of global `shape` with the same splits. It never shares memory with the input: what changes
        nothing (padding by 0, interpolation to the same size) is a copy on one device, too."""
        if local.untyped_storage().data_ptr() == self.memory:
            local = local.clone()
        return from_local(local, self.mesh, self.placements, tuple(shape), self.cause.ledger)


def enter(x: Any, op: str) -> tuple[Space, torch.Tensor]:
    """The place and the local part of `x`; differentiable."""
    local = to_local(x)
    memory = local.untyped_storage().data_ptr()
    return Space(x._spec.mesh, placements_of(x), tuple(x.shape), cause_for(op, x), memory), local


def fetch_windows(local: torch.Tensor, size: int, windows: Sequence[Interval], line: Line) -> torch.Tensor:
    """`fetch` for windows of which some are empty: a rank without work asks for an empty piece of its own part, so
    that an operation whose windows are the chunks themselves exchanges and copies nothing."""
    wanted = tuple(
        window if window.size else Interval(own.lo, own.lo)
        for window, own in zip(windows, chunks(size, line.ranks), strict=True)
    )
    return fetch(local, size, wanted, line)


def result_dtype(local: torch.Tensor, plain: Callable[[torch.Tensor], torch.Tensor]) -> torch.dtype:
    """The dtype that the plain operator gives: autocast may widen it. `plain` is applied to one element."""
    if not torch.is_autocast_enabled(local.device.type):
        return local.dtype
    return plain(local.new_zeros((1,) * local.ndim)).dtype


def nothing(local: torch.Tensor, shape: Sequence[int], plain: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A result of `shape` without elements: `plain` of one made-up element, of which nothing is taken.

    So the graph of this rank has the operators that those of the others have, and the first and second backward reach
    the same exchanges on all of them.
    """
    one = local.new_zeros((1,) * local.ndim) + local.narrow(0, 0, 0).sum().to(local.dtype)
    return plain(one).narrow(0, 0, 0).reshape(tuple(shape))


def picked(local: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`index_select` along a spatial dim; torch's own forgets channels_last."""
    if local.ndim < 4 or memory_format(local) is torch.contiguous_format:
        return local.index_select(dim, index)
    return local.movedim(1, -1).index_select(dim - 1, index).movedim(-1, 1)


def raster(places: Sequence[torch.Tensor], whole: Sequence[int]) -> torch.Tensor:
    """Positions along each dim as raster positions in the `whole` space."""
    out = places[0]
    for place, size in zip(places[1:], whole[1:], strict=True):
        out = out * size + place
    return out


def unravelled(index: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Raster positions within `sizes` as positions along each dim."""
    places = []
    for size in reversed(sizes[1:]):
        places.append(index % size)
        index = index // size
    return [index, *reversed(places)]
