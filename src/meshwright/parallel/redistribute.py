"""Moving between placements, and between mesh tensors and plain local ones; all differentiable.

A gradient is a mesh tensor like any other: its *global* value is what counts. Where a replicated tensor was used by
computations that ranks did on different data, its gradient is Partial (the ranks hold summands) and stays so as
long as only linear work touches it: parameter gradients are then summed once, in buckets (`meshwright.sync`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import Ledger, layer
from meshwright.parallel.comm import Cause, all_gather_dim, all_reduce, swap_dims
from meshwright.parallel.history import direct as history_of
from meshwright.parallel.history import node_of
from meshwright.parallel.layout import PARTIAL, REPLICATE, Placements, partial_axes, replicated, splits, with_axis
from meshwright.parallel.mesh import coordinates, sizes
from meshwright.parallel.tensor import MeshTensor, alike, fresh, is_mesh, wrap
from meshwright.plan.geometry import chunk


def move(
    local: torch.Tensor,
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    source: Placements,
    target: Placements,
    cause: Cause,
) -> torch.Tensor:
    """The local part under `target` from the local part under `source`; no autograd. Collective."""
    if source == target:
        return local
    held = list(source)
    for axis, new in enumerate(target):  # first whatever makes parts larger: sums, and splits that end
        old = held[axis]
        if isinstance(old, Partial) and old != new:
            local = all_reduce(local, mesh, [axis], cause, str(old.reduce_op))
            held[axis] = REPLICATE
        elif isinstance(old, Shard) and old != new:
            taken = any(isinstance(p, Shard) and p.dim == getattr(new, "dim", None) for p in held)
            if isinstance(new, Shard) and not taken:
                local = swap_dims(local, mesh, axis, old.dim, new.dim, shape, cause)
                held[axis] = new
            else:
                local = all_gather_dim(local, mesh, axis, old.dim, shape[old.dim], cause)
                held[axis] = REPLICATE
    for axis, new in enumerate(target):  # then whatever only drops data
        if held[axis] == new:
            continue
        if isinstance(new, Shard):
            span = chunk(shape[new.dim], sizes(mesh)[axis], coordinates(mesh)[axis])
            local = local.narrow(new.dim, span.lo, span.size)
        elif coordinates(mesh)[axis]:  # to Partial: the first rank keeps the value, the others add nothing
            local = torch.zeros_like(local)
    return local


def same(local: torch.Tensor) -> torch.Tensor:
    """A view with equal strides. (`view_as` changes the stride of a batch of one, by which torch then no longer
    recognises `channels_last` and takes slow kernels.)"""
    return torch.ops.aten.alias.default(local)


def one_split_per_dim(placements: Placements) -> bool:
    """Whether no dim is split by two axes at once (such layouts are not used here)."""
    dims = [dim for _, dim in splits(placements)]
    return len(dims) == len(set(dims))


def _meshed(grad: Any, mesh: DeviceMesh) -> Any:
    """A gradient as a mesh tensor: autograd may hand over plain zeros, of which torch keeps the shape alone."""
    if is_mesh(grad):
        return grad
    return wrap(torch.zeros_like(grad) if grad._is_zerotensor() else grad, mesh, replicated(mesh))


class _Redistribute(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, target: Placements, cause: Cause) -> MeshTensor:
        mesh, shape = x._spec.mesh, tuple(x._spec.shape)
        ctx.mesh, ctx.source, ctx.cause = mesh, tuple(x._spec.placements), cause
        local = move(x._local_tensor, mesh, shape, ctx.source, target, cause)
        if local is x._local_tensor:
            local = same(local)
        return wrap(local, mesh, target, shape, x._ledger)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grad = _meshed(grad, ctx.mesh)
        return redistribute(grad, gradient_placements(ctx.source, grad), ctx.cause), None, None


def gradient_placements(source: Placements, grad: Any) -> Placements:
    """How the gradient of a tensor placed as `source` is best held: its splits; sums stay unsummed."""
    return tuple(
        old if isinstance(old, Shard) else (now if isinstance(now, Partial) else REPLICATE)
        for old, now in zip(source, grad._spec.placements, strict=True)
    )


def redistribute(x: Any, target: Placements, cause: Cause | None = None) -> Any:
    """The same global value under `target`. Raises `UnsupportedError` if two axes would split one dim."""
    if x._frozen_view:
        fresh(x)
    if tuple(x._spec.placements) == target:
        return x
    ndim = len(x._spec.shape)
    target = tuple(Shard(p.dim % ndim) if isinstance(p, Shard) else p for p in target)
    if not one_split_per_dim(target):
        raise UnsupportedError(f"two mesh axes cannot split the same dim: {target}")
    return _Redistribute.apply(x, target, cause or Cause(x._ledger, (layer(), "redistribute")))


def replicate(x: Any, cause: Cause | None = None) -> Any:
    """The same value, whole on every rank."""
    return redistribute(x, replicated(x._spec.mesh), cause)


def _is_plain_backward() -> bool:
    """Whether nobody differentiates what a backward computes: then a step of it needs no node of its own, which costs
    as much as the step."""
    return not torch.is_grad_enabled() and forward_ad._current_level < 0


class _ToLocal(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, grad_axes: tuple[int, ...]) -> torch.Tensor:
        spec = x._spec
        ctx.source = spec.mesh, tuple(spec.shape), x._ledger
        ctx.placements = tuple(
            PARTIAL if axis in grad_axes and not isinstance(p, Shard) else p for axis, p in enumerate(spec.placements)
        )
        ctx.set_materialize_grads(False)
        local: torch.Tensor = x._local_tensor
        return same(local)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        if grad is None:
            return None, None
        mesh, shape, ledger = ctx.source
        if _is_plain_backward():
            return wrap(same(grad), mesh, ctx.placements, shape, ledger), None
        return _FromLocal.apply(grad, mesh, ctx.placements, shape, ledger), None

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
    part = history_of(x) if direct and torch.is_grad_enabled() else None
    if part is not None and all(isinstance(x._spec.placements[axis], Shard) for axis in grad_axes):
        return part
    if x._frozen_view:
        fresh(x)
    if partial_axes(tuple(x._spec.placements)):
        x = redistribute(x, tuple(REPLICATE if isinstance(p, Partial) else p for p in x._spec.placements))
    return _ToLocal.apply(x, grad_axes)


class _ToPart(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, axis: int, grad_axes: tuple[int, ...]) -> torch.Tensor:
        mesh, shape = x._spec.mesh, tuple(x._spec.shape)
        held = tuple(PARTIAL if other in grad_axes else REPLICATE for other in range(mesh.ndim))
        ctx.source = mesh, with_axis(held, axis, Shard(0)), shape, x._ledger
        span = chunk(shape[0], sizes(mesh)[axis], coordinates(mesh)[axis])
        part: torch.Tensor = x._local_tensor.narrow(0, span.lo, span.size)
        return part

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if _is_plain_backward():
            return wrap(same(grad), *ctx.source), None, None
        return _FromLocal.apply(grad, *ctx.source), None, None


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


class _FromLocal(Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: torch.Tensor,
        mesh: DeviceMesh,
        placements: Placements,
        shape: tuple[int, ...],
        ledger: Ledger | None,
        like: Any = None,
    ) -> MeshTensor:
        _remember(ctx, mesh, placements, ledger)
        part = local.detach()  # no view: torch would look for its base when it is written
        return wrap(part, mesh, placements, shape, ledger) if like is None else alike(part, like[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _of_part(ctx, grad), *(None,) * 5


def _remember(ctx: Any, mesh: DeviceMesh, placements: Placements, ledger: Ledger | None) -> None:
    ctx.mesh, ctx.placements = mesh, placements
    ctx.cause = Cause(ledger, (layer(), "gradient"))
    ctx.save_for_backward(_mark)


def _of_part(ctx: Any, grad: Any) -> torch.Tensor:
    """The gradient of a part from that of the mesh tensor around it."""
    _ = ctx.saved_tensors
    target = tuple(REPLICATE if isinstance(p, Partial) else p for p in ctx.placements)
    grad = redistribute(_meshed(grad, ctx.mesh), target, ctx.cause)
    if _is_plain_backward() and not grad._frozen_view and not partial_axes(tuple(grad._spec.placements)):
        return same(grad._local_tensor)
    return to_local(grad, partial_axes(ctx.placements))


class _Written(Function):
    """A mesh tensor whose part was written in place: so was it, and its gradient goes to the part."""

    @staticmethod
    def forward(ctx: Any, x: Any, part: torch.Tensor) -> Any:
        _remember(ctx, x._spec.mesh, tuple(x._spec.placements), x._ledger)
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
    return _with_history(_FromLocal.apply(local, mesh, placements, shape, ledger), local, placements)


def from_local_alike(local: torch.Tensor, x: Any) -> MeshTensor:
    """The same where the part belongs in the place of that of `x`: cheaper if it lies as that does."""
    spec, part = x._spec, x._local_tensor
    if local.shape != part.shape or local.stride() != part.stride() or local.dtype != part.dtype:
        return from_local(local, spec.mesh, tuple(spec.placements), tuple(spec.shape), x._ledger)
    given = spec.mesh, spec.placements, spec.shape, x._ledger
    return _with_history(_FromLocal.apply(local, *given, [x]), local, spec.placements)  # a list hides from autograd


def written(x: Any, part: torch.Tensor) -> Any:
    """`x` now that `part`, its history, was written in place."""
    with torch._C.DisableTorchFunctionSubclass():
        x.detach_()  # what was before leads to the part, too
        _Written.apply(x, part)
    x._history = part, node_of(x)
    return x


_HELD = "_meshwright_held"  # an attribute of parts that are the history of a mesh tensor


def _with_history(out: Any, local: torch.Tensor, placements: Placements) -> MeshTensor:
    """The gradients of two mesh tensors must not meet on one part: only the first has it for its history."""
    is_alone = local.grad_fn is not None and torch.is_grad_enabled() and _HELD not in local.__dict__
    if is_alone and not partial_axes(placements):
        local.__dict__[_HELD] = True
        out._history = local, node_of(out)
    made: MeshTensor = out
    return made
