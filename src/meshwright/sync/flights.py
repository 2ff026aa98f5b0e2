"""Gradients of one bucket on their way: summed over the ranks that have summands, or gathered where each has a part.

Both are made of pieces that land when backward has ended; what a hook changed meanwhile is told, not overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from meshwright.parallel.account import totals
from meshwright.parallel.collective import Parts, Sum, SumQueue, summed_bytes
from meshwright.parallel.comm import dense_strides
from meshwright.parallel.layout import PARTIAL, REPLICATE, owned, partial_axes, splits
from meshwright.parallel.mesh import SUMS_LANE, coordinates, reduction_groups, sizes
from meshwright.parallel.tensor import spec_of, version
from meshwright.plan.geometry import chunk
from meshwright.sync.memory import in_order, is_alone, is_dense, line_of, shaped


class Summed:
    """Summands of gradients on their way to the sum along `axes`."""

    def __init__(self, parameters: list[Any], axes: tuple[int, ...]) -> None:
        self.parameters, self.axes = parameters, axes
        grads = [p.grad for p in parameters]
        self.mesh = grads[0]._spec.mesh
        alone = [is_alone(grad) for grad in grads]
        self.held = [(grad, grad._local_tensor, version(grad)) for grad in grads]
        # In the memory order of the parameters, which is the same on all ranks: that of gradients depends on the
        # kernels that a rank's part got.
        self.parts = [in_order(p, held) for p, (_, held, _) in zip(parameters, self.held, strict=True)]
        lines = [line_of(part) for part in self.parts]
        # Sums in the memory of their summands, where nobody else sees it: fresh memory costs more than the sum.
        out = [
            line if is_ours or part is not held else torch.empty_like(line)
            for line, is_ours, part, (_, held, _) in zip(lines, alone, self.parts, self.held, strict=True)
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
        nbytes = summed_bytes(sum(part.numel() * part.element_size() for part in parts), ranks)
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
        changed = []
        given = zip(self.parameters, self.held, self.parts, self.work.results, strict=True)
        for p, (grad, held, before), part, total in given:
            if is_changed(p, grad, held, before):
                changed.append(tuple(p.shape))
                continue
            placements = tuple(
                REPLICATE if axis in self.axes else place for axis, place in enumerate(grad._spec.placements)
            )
            shape = tuple(grad._spec.shape)
            grad._spec = spec_of(self.mesh, placements, shape, grad._spec.tensor_meta.stride, part.dtype)
            local = part if total.data_ptr() == part.data_ptr() else shaped(total, part)
            if local.stride() != held.stride():  # the same numbers in the strides that the gradient had
                local = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device).copy_(
                    local
                )
            grad._local_tensor = local
        return changed


class Gathered:
    """Parts of gradients, split along their first dim over the ranks of `axis`, on their way to everybody."""

    def __init__(self, parameters: list[Any], axis: int) -> None:
        self.parameters = parameters
        grads = [p.grad for p in parameters]
        self.mesh = grads[0]._spec.mesh
        self.held = [(grad, grad._local_tensor, version(grad)) for grad in grads]
        ranks, me = sizes(self.mesh)[axis], coordinates(self.mesh)[axis]
        self.wholes, parts = [], []
        for p, (_, held, _) in zip(parameters, self.held, strict=True):
            whole = _blank(p, held)
            spans = [chunk(whole.shape[0], ranks, rank) for rank in range(ranks)]
            each = [whole.narrow(0, span.lo, span.size) for span in spans]
            each[me].copy_(held)
            self.wholes.append(whole)
            parts.append([line_of(part) for part in each])
        mine = [lines[me] for lines in parts]
        theirs = {rank: [lines[rank] for lines in parts] for rank in range(ranks) if rank != me}
        nbytes = sum(line.numel() * line.element_size() for line in mine)
        totals.sent_bytes += nbytes * len(theirs)
        totals.reduced_bytes += nbytes * len(theirs)
        totals.messages += len(theirs) if nbytes else 0
        self.work = Parts(mine, theirs, reduction_groups(self.mesh)[1].get_group(axis))

    def land(self, _: SumQueue) -> list[tuple[int, ...]]:
        """Wait, and give every parameter all of its gradient, but those of the shapes returned, as `Summed` does."""
        self.work.wait()
        changed = []
        for p, (grad, held, before), whole in zip(self.parameters, self.held, self.wholes, strict=True):
            if is_changed(p, grad, held, before):
                changed.append(tuple(p.shape))
                continue
            strides = dense_strides(held, whole.shape)  # the same numbers in the memory order that the gradient had
            if strides != whole.stride():
                whole = torch.empty_strided(whole.shape, strides, dtype=held.dtype, device=held.device).copy_(whole)
            everywhere = (REPLICATE,) * self.mesh.ndim
            grad._spec = spec_of(self.mesh, everywhere, tuple(whole.shape), strides, held.dtype)
            grad._local_tensor = whole
        return changed


def is_changed(p: Any, grad: Any, held: torch.Tensor, before: int) -> bool:
    """Whether somebody changed a gradient since its part `held` was sent."""
    return p.grad is not grad or grad._local_tensor is not held or version(grad) != before


def _blank(p: Any, held: torch.Tensor) -> torch.Tensor:
    """Memory for a gradient in the order of its parameter if filters lie one behind the other there, which is the same
    on all ranks."""
    shape, local = tuple(p._spec.shape), p._local_tensor
    found = local if local.shape == shape and is_dense(local) else held.new_empty(shape, device="meta")
    strides = found.stride() if found.stride(0) * shape[0] == found.numel() else None
    out = held.new_empty(shape)
    return out if strides is None else out.as_strided_(shape, strides)


def gathered_axis(grad: Any) -> int | None:
    """The axis along which ranks have parts of a gradient that is neither a summand nor split any other way."""
    found = splits(tuple(grad._spec.placements))
    alone = len(found) == 1 and found[0][1] == 0 and not partial_axes(tuple(grad._spec.placements))
    return found[0][0] if alone else None


def as_summand(grad: Any) -> None:
    """A gradient that came split (of a weight as wide as the activation) as a summand: zeros where others own it."""
    spec = grad._spec
    placements = tuple(spec.placements)
    if not splits(placements):
        return
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
