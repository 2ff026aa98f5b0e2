"""Between mesh tensors and plain local parts; differentiable.

Which of the two a rule works on is the rule's choice: on parts torch's own functions and graph do the rest. Gradients
keep to the splits of what they are of; where ranks used a whole tensor on different data they are summands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import Ledger, layer
from meshwright.parallel.comm import Cause
from meshwright.parallel.decided import decided
from meshwright.parallel.history import direct as history_of
from meshwright.parallel.history import node_of
from meshwright.parallel.layout import PARTIAL, REPLICATE, Placements, partial_axes, with_axis
from meshwright.parallel.mesh import coordinates, sizes
from meshwright.parallel.node import Node
from meshwright.parallel.redistribute import meshed_gradient, redistribute, replicate, same
from meshwright.parallel.tensor import Layout, MeshTensor, fresh, under
from meshwright.plan.geometry import Interval, chunk


def _is_plain_backward() -> bool:
    """Whether nobody differentiates what a backward computes: then a step of it needs no node of its own, which costs
    as much as the step."""
    return not torch.is_grad_enabled() and forward_ad._current_level < 0


@decided(1)
def _summands(spec: DTensorSpec, grad_axes: tuple[int, ...]) -> Layout:
    """That of the gradient of a tensor, which is in summands along `grad_axes` where it is not split."""
    held = enumerate(spec.placements)
    placements = tuple(PARTIAL if axis in grad_axes and not isinstance(p, Shard) else p for axis, p in held)
    return Layout(spec.mesh, placements, tuple(spec.shape))


def _gradient(grad: torch.Tensor, layout: Layout, ledger: Ledger | None) -> Any:
    """That of a mesh tensor, from that of its part."""
    if _is_plain_backward():
        # no view, which would hold another tensor on its memory: then nobody could tell that nobody else sees it
        return under(grad.detach(), layout.spec(grad), ledger)
    return _FromLocal.apply(grad, layout.spec(grad), ledger)


class _ToLocal(Node):
    @staticmethod
    def forward(ctx: Any, x: Any, grad_axes: tuple[int, ...]) -> torch.Tensor:
        ctx.given = _summands(x._spec, grad_axes), x._ledger
        ctx.set_materialize_grads(False)
        return same(x._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        return None if grad is None else _gradient(grad, *ctx.given), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedError(
            f"layer {layer()!r}: dual numbers (forward AD) do not pass exchanges between ranks. "
            "torch.autograd.functional.jvp gives the same by two backward passes"
        )


def to_local(x: Any, grad_axes: tuple[int, ...] = (), *, direct: bool = True) -> torch.Tensor:
    """This rank's part as a plain tensor. Along `grad_axes` ranks compute on different data with a replicated `x`,
    so there the gradient is a summand (Partial). A Partial `x` is summed first. `direct`: it may be the very tensor
    that `x` was made of."""
    part = history_of(x) if direct and x._history is not None and torch.is_grad_enabled() else None
    if part is not None and (not grad_axes or all(isinstance(x._spec.placements[axis], Shard) for axis in grad_axes)):
        return part
    if x._frozen_view:
        fresh(x)
    if partial_axes(tuple(x._spec.placements)):
        x = redistribute(x, tuple(REPLICATE if isinstance(p, Partial) else p for p in x._spec.placements))
    return _ToLocal.apply(x, grad_axes)


@decided(1)
def _part(spec: DTensorSpec, axis: int, grad_axes: tuple[int, ...]) -> tuple[Interval, Layout]:
    """This rank's chunk, along `axis`, of the first dim of a whole tensor, and where the gradient of chunks lies."""
    mesh, shape = spec.mesh, tuple(spec.shape)
    held = tuple(PARTIAL if other in grad_axes else REPLICATE for other in range(mesh.ndim))
    span = chunk(shape[0], sizes(mesh)[axis], coordinates(mesh)[axis])
    return span, Layout(mesh, with_axis(held, axis, Shard(0)), shape)


class _ToPart(Node):
    @staticmethod
    def forward(ctx: Any, x: Any, axis: int, grad_axes: tuple[int, ...]) -> torch.Tensor:
        span, layout = _part(x._spec, axis, grad_axes)
        ctx.given = layout, x._ledger
        part: torch.Tensor = x._local_tensor.narrow(0, span.lo, span.hi - span.lo)
        return part

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _gradient(grad, *ctx.given), None, None


def to_part(x: Any, axis: int, grad_axes: tuple[int, ...] = ()) -> torch.Tensor:
    """This rank's chunk, along `axis`, of the first dim of `x`, with which no other rank computes: so the gradient of a
    parameter is split there, with nothing to sum. That of computed values, for which not all operators have a split
    form, is a summand, as it is along `grad_axes`."""
    if x.is_leaf:
        return _ToPart.apply(replicate(x), axis, grad_axes)
    mesh, local = x._spec.mesh, to_local(replicate(x), (*grad_axes, axis))
    span = chunk(local.shape[0], sizes(mesh)[axis], coordinates(mesh)[axis])
    return local.narrow(0, span.lo, span.size)


# A checkpoint repeats its forward when backward first asks for something saved, and stops after the last thing saved.
# Between the exchanges of a rule that may be another place on every rank, so every rule ends by saving this.
_mark = torch.empty(0)


class _FromLocal(Node):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, spec: DTensorSpec, ledger: Ledger | None) -> MeshTensor:
        _remember(ctx, spec, ledger)
        return under(local.detach(), spec, ledger)  # no view: torch would look for its base when it is written

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _of_part(ctx, grad), None, None


def _remember(ctx: Any, spec: DTensorSpec, ledger: Ledger | None) -> None:
    ctx.spec, ctx.ledger, ctx.layer = spec, ledger, layer()
    ctx.save_for_backward(_mark)


def _of_part(ctx: Any, grad: Any) -> torch.Tensor:
    """The gradient of a part from that of the mesh tensor around it."""
    _ = ctx.saved_tensors
    spec = ctx.spec
    target = tuple(REPLICATE if isinstance(p, Partial) else p for p in spec.placements)
    grad = redistribute(meshed_gradient(grad, spec.mesh), target, Cause(ctx.ledger, (ctx.layer, "gradient")))
    if _is_plain_backward() and not grad._frozen_view and not partial_axes(tuple(grad._spec.placements)):
        return same(grad._local_tensor)
    return to_local(grad, partial_axes(spec.placements))


class _Written(Node):
    """A mesh tensor whose part was written in place: so was it, and its gradient goes to the part."""

    @staticmethod
    def forward(ctx: Any, x: Any, part: torch.Tensor) -> Any:
        _remember(ctx, x._spec, x._ledger)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, _of_part(ctx, grad)


def from_local(
    local: torch.Tensor,
    mesh: DeviceMesh,
    placements: Placements,
    shape: tuple[int, ...],
    ledger: Ledger | None = None,
) -> MeshTensor:
    """A mesh tensor of global `shape` from this rank's part; differentiable."""
    return laid(local, Layout(mesh, placements, shape), ledger)


def laid(local: torch.Tensor, layout: Layout, ledger: Ledger | None) -> MeshTensor:
    """The same in a layout that is kept: at half the cost."""
    return _made(local, layout.spec(local), ledger)


def from_local_alike(local: torch.Tensor, x: Any) -> MeshTensor:
    """The same where the part belongs in the place of that of `x`: cheaper if it lies as that does."""
    spec, part = x._spec, x._local_tensor
    if local.shape != part.shape or local.stride() != part.stride() or local.dtype != part.dtype:
        return from_local(local, spec.mesh, tuple(spec.placements), tuple(spec.shape), x._ledger)
    return _made(local, spec, x._ledger)


def _made(local: torch.Tensor, spec: DTensorSpec, ledger: Ledger | None) -> MeshTensor:
    """The gradients of two mesh tensors must not meet on one part: only the first has it for its history."""
    out: MeshTensor = _FromLocal.apply(local, spec, ledger)
    is_alone = local.grad_fn is not None and _HELD not in local.__dict__ and torch.is_grad_enabled()
    if is_alone and not partial_axes(spec.placements):
        local.__dict__[_HELD] = True
        out._history = local, node_of(out)
    return out


def written(x: Any, part: torch.Tensor) -> Any:
    """`x` now that `part`, its history, was written in place."""
    with torch._C.DisableTorchFunctionSubclass():
        x.detach_()  # what was before leads to the part, too
        _Written.apply(x, part)
    x._history = part, node_of(x)
    return x


_HELD = "_meshwright_held"  # an attribute of parts that are the history of a mesh tensor
