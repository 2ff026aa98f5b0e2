"""Gradients of one bucket on their way: summed over the ranks that have summands, or gathered where each has a part.

Both are made of pieces that land when backward has ended; what a hook changed meanwhile is told, not overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.parallel.account import totals
from meshwright.parallel.collective import Parts, Sum, SumQueue, summed_bytes
from meshwright.parallel.comm import dense_strides
from meshwright.parallel.decided import decided
from meshwright.parallel.layout import PARTIAL, REPLICATE, owned, partial_axes, splits
from meshwright.parallel.mesh import SUMS_LANE, coordinates, reduction_groups, sizes
from meshwright.parallel.tensor import spec_of
from meshwright.plan.geometry import chunk, chunks
from meshwright.sync.memory import changes, held, in_order, is_dense, line_of, shaped

_nbytes = attrgetter("nbytes")


class Summed:
    """Summands of gradients on their way to the sum along `axes`."""

    def __init__(self, found: list[tuple[Any, Any]], axes: tuple[int, ...]) -> None:
        self.axes, self.held, self.mesh = axes, held(found), found[0][1]._spec.mesh
        # In the memory order of the parameters, which is the same on all ranks: that of gradients depends on the
        # kernels that a rank's part got.
        self.parts = [in_order(sent.parameter, sent.part) for sent in self.held]
        lines = [line_of(part) for part in self.parts]
        # Sums in the memory of their summands, where nobody else sees it: fresh memory costs more than the sum.
        out = [
            line if sent.is_alone or part is not sent.part else torch.empty_like(line)
            for line, part, sent in zip(lines, self.parts, self.held, strict=True)
        ]
        world, own_mesh = reduction_groups(self.mesh)
        if len(axes) == self.mesh.ndim:  # every rank of the job: one all-reduce instead of one per axis
            self.stages = [(world, self.mesh.size())]
        else:
            self.stages = [(own_mesh.get_group(axis), sizes(self.mesh)[axis]) for axis in axes]
        self.work = self._start(lines, out, *self.stages[0])

    def _start(
        self, parts: Sequence[torch.Tensor], out: Sequence[torch.Tensor], pg: dist.ProcessGroup, ranks: int
    ) -> Sum:
        nbytes = summed_bytes(sum(map(_nbytes, parts)), ranks)
        totals.sent_bytes += nbytes
        totals.reduced_bytes += nbytes
        totals.messages += 1
        return Sum(parts, pg, lane=SUMS_LANE, out=out)

    def land(self, queue: SumQueue) -> list[tuple[int, ...]]:
        """Wait, and give every parameter its sum, but those of the shapes returned: a hook changed their gradients."""
        self.work.wait()
        for stage in self.stages[1:]:
            self.work = self._start(self.work.results, self.work.results, *stage)
            queue.add(self.work)  # other modules have sums on this axis, too
            queue.fold([self.work])
            self.work.wait()
        changed = changes(self.held)
        for sent, part, total in zip(self.held, self.parts, self.work.results, strict=True):
            p, grad, before = sent.parameter, sent.grad, sent.part
            if id(p) in changed:
                continue
            grad._spec = _summed(grad._spec, self.axes)
            local = part if total.data_ptr() == part.data_ptr() else shaped(total, part)
            if local is not before and local.stride() != before.stride():  # in the strides that the gradient had
                local = before.new_empty_strided(before.shape, before.stride()).copy_(local)
            grad._local_tensor = local
        return list(changed.values())


class Gathered:
    """Parts of gradients, split along their first dim over the ranks of `axis`, on their way to everybody."""

    def __init__(self, found: list[tuple[Any, Any]], axis: int) -> None:
        self.held, self.mesh = held(found), found[0][1]._spec.mesh
        ranks, me = sizes(self.mesh)[axis], coordinates(self.mesh)[axis]
        self.wholes, parts = [], []
        for sent in self.held:
            part, shape, strides = sent.part, tuple(sent.parameter._spec.shape), _strides(sent.parameter)
            first = chunk(shape[0], ranks, me).lo
            whole = _around(part, shape, strides, first) if sent.is_alone else None
            if whole is None:
                whole = part.new_empty_strided(shape, strides)
                whole.narrow(0, first, part.shape[0]).copy_(part)
            self.wholes.append(whole)
            parts.append(_chunks(line_of(whole), shape[0], ranks))
        mine = [lines[me] for lines in parts]
        theirs = {rank: [lines[rank] for lines in parts] for rank in range(ranks) if rank != me}
        nbytes = sum(map(_nbytes, mine))
        totals.sent_bytes += nbytes * len(theirs)
        totals.reduced_bytes += nbytes * len(theirs)
        totals.messages += len(theirs) if nbytes else 0
        self.work = Parts(mine, theirs, reduction_groups(self.mesh)[1].get_group(axis))

    def land(self, _: SumQueue) -> list[tuple[int, ...]]:
        """Wait, and give every parameter all of its gradient, but those of the shapes returned, as `Summed` does."""
        self.work.wait()
        changed = changes(self.held)
        for sent, whole in zip(self.held, self.wholes, strict=True):
            if id(sent.parameter) in changed:
                continue
            strides = dense_strides(sent.part, whole.shape)  # the same numbers in the order that the gradient had
            if strides != whole.stride():
                whole = whole.new_empty_strided(whole.shape, strides).copy_(whole)
            sent.grad._spec = _gathered(sent.grad._spec, strides)
            sent.grad._local_tensor = whole
        return list(changed.values())


def _chunks(line: torch.Tensor, rows: int, ranks: int) -> list[torch.Tensor]:
    """The memory of each rank's chunk of `rows` that lie one behind the other."""
    width = line.shape[0] // max(1, rows)
    return list(line.split([(span.hi - span.lo) * width for span in chunks(rows, ranks)]))


def _strides(p: Any) -> tuple[int, ...]:
    """Those of the gradient of a parameter whose filters lie one behind the other: those of the parameter if it is so,
    which are the same on all ranks."""
    shape, local = tuple(p._spec.shape), p._local_tensor
    if local.shape == shape and is_dense(local) and local.stride(0) * shape[0] == local.numel():
        strides: tuple[int, ...] = local.stride()
        return strides
    return torch.empty(shape, device="meta").stride()


def _around(held: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], first: int) -> torch.Tensor | None:
    """All of a gradient in the memory of a part of it, from `first` on, if that was made where the whole has it. The
    part is alone there, so nobody sees what is written beside it."""
    memory = held.untyped_storage()
    fits = held.stride() == strides and memory.nbytes() == math.prod(shape) * held.element_size()
    if not fits or held.storage_offset() != first * strides[0]:
        return None
    return held.new_empty(0).set_(memory, 0, shape, strides)


@decided(1)
def way_of(spec: DTensorSpec) -> int | tuple[int, ...] | None:
    """The axis along which ranks have parts of a gradient that is neither a summand nor split any other way; the axes
    along which they have summands; None if it is split otherwise."""
    placements = tuple(spec.placements)
    found, axes = splits(placements), partial_axes(placements)
    if not found:
        return axes
    return found[0][0] if len(found) == 1 and found[0][1] == 0 and not axes else None


@decided(1)
def _summed(spec: DTensorSpec, axes: tuple[int, ...]) -> DTensorSpec:
    """That of the sum along `axes`."""
    placements = tuple(REPLICATE if axis in axes else place for axis, place in enumerate(spec.placements))
    meta: Any = spec.tensor_meta
    return spec_of(spec.mesh, placements, tuple(meta.shape), meta.stride, meta.dtype)


@decided(1)
def _gathered(spec: DTensorSpec, strides: tuple[int, ...]) -> DTensorSpec:
    """That of a gradient of which every rank has all."""
    meta: Any = spec.tensor_meta
    return spec_of(spec.mesh, (REPLICATE,) * spec.mesh.ndim, tuple(meta.shape), strides, meta.dtype)


def as_summand(grad: Any) -> None:
    """A gradient that came split (of a weight as wide as the activation) as a summand: zeros where others own it."""
    spec = grad._spec
    placements = tuple(spec.placements)
    shape = tuple(spec.shape)
    whole = grad._local_tensor.new_zeros(shape)
    part = whole
    for _, dim in splits(placements):
        span = owned(spec.mesh, placements, dim, shape[dim])
        part = part.narrow(dim, span.lo, span.size)
    part.copy_(grad._local_tensor)
    held = tuple(PARTIAL if isinstance(p, Shard) else p for p in placements)
    grad._local_tensor = whole
    grad._spec = spec_of(spec.mesh, held, shape, tuple(whole.stride()), whole.dtype)
