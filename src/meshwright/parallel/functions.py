"""What the rules for whole torch functions (convolution, pooling, losses ...) share.

Such a rule works in three steps, all differentiable: local parts out of mesh tensors (`to_local`), windows where a
split dim needs its neighbours (`exchange.fetch`), the plain torch function on local tensors, and back (`from_local`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.errors import StrictError, UnsupportedError
from meshwright.parallel.account import Ledger, layer, nobody, totals
from meshwright.parallel.comm import Cause
from meshwright.parallel.decided import decided
from meshwright.parallel.layout import REPLICATE, Placements, partial_axes, replicated, splits, with_axis
from meshwright.parallel.mesh import home_dim
from meshwright.parallel.parts import from_local
from meshwright.parallel.redistribute import redistribute
from meshwright.parallel.tensor import FUNCTIONS, MeshOps, is_mesh, ledger_of, wrap


def function(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule for torch functions. A rule may return NotImplemented to pass on to the ATen rules."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            FUNCTIONS[func] = rule
        return rule

    return register


def as_mesh(value: Any, mesh: DeviceMesh) -> Any:
    """A plain tensor as a mesh tensor, equal on every rank; differentiable. Mesh tensors as they are."""
    if value is None or is_mesh(value):
        return value
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise UnsupportedError(
            f"torch.func (grad, vjp, jvp, vmap ...) of layer {layer()!r}: these transforms do not see exchanges "
            "between ranks. torch.autograd.grad(..., create_graph=True) gives the same gradients, of any order"
        )
    placements = replicated(mesh)
    if value.requires_grad:
        return from_local(value, mesh, placements, tuple(value.shape))
    return wrap(value, mesh, placements)


def mesh_of(*values: Any) -> DeviceMesh:
    """The mesh of the first mesh tensor."""
    for value in values:
        if isinstance(value, MeshOps):
            mesh: DeviceMesh = value._spec.mesh
            return mesh
    raise TypeError("no mesh tensor among the operands")


def meshed(*values: Any) -> tuple[Any, ...]:
    """All of them as `as_mesh` gives them, on the mesh of the first mesh tensor."""
    for value in values:
        if value is not None and not isinstance(value, MeshOps):
            mesh = mesh_of(*values)
            return tuple(as_mesh(value, mesh) for value in values)
    return values


def placements_of(x: Any) -> Placements:
    """The placements of what `to_local` gives, which adds summands up first."""
    return whole_placements(x._spec)


def whole_placements(spec: DTensorSpec) -> Placements:
    """Those of a spec with its summands added up."""
    placements = tuple(spec.placements)
    axes = partial_axes(placements)
    return tuple(REPLICATE if axis in axes else p for axis, p in enumerate(placements)) if axes else placements


def cause_for(op: str, *values: Any) -> Cause:
    """On whose behalf a rule communicates."""
    return _cause(ledger_of(values), layer(), op)


@lru_cache(maxsize=4096)
def _cause(ledger: Ledger | None, name: str, op: str) -> Cause:
    return Cause(ledger, (name, op))


def gathered(x: Any, dims: Sequence[int], op: str) -> Any:
    """`x` made whole along `dims` because `op` has no split form there: by an all-to-all where another dim can take the
    split, as after convolutions by filters. Else it is gathered, which is reported once, or refused when strict.

    Raises `StrictError` before any gather.
    """
    if _split_dims(x._spec).isdisjoint(dims):
        return x
    x = sent_home(x, dims, op)
    hit = _hit(x, dims)
    if not hit:
        return x
    cause = cause_for(op, x)
    if cause.ledger is not None and cause.ledger.strict:
        raise StrictError(
            f"{op} in layer {layer()!r} has no exact split form along dims {hit} of {tuple(x.shape)}; "
            "strict=True forbids to gather"
        )
    before = totals.sent_bytes
    whole = made_whole(x, hit, cause)
    nbytes = totals.sent_bytes - before
    totals.gathered_bytes += nbytes
    (cause.ledger or nobody).gathered(*cause.place, nbytes)
    return whole


@decided(1)
def _split_dims(spec: DTensorSpec) -> frozenset[int]:
    return frozenset(dim for _, dim in splits(tuple(spec.placements)))


def _hit(x: Any, dims: Sequence[int]) -> list[int]:
    """Those of `dims` that are split."""
    return [dim for _, dim in splits(placements_of(x)) if dim in dims]


def sent_home(x: Any, dims: Sequence[int], op: str) -> Any:
    """`x` with splits of `dims` moved to where the plan has them, if nothing splits that dim already: an all-to-all."""
    held = placements = placements_of(x)
    mesh, taken = x._spec.mesh, [dim for _, dim in splits(held)]
    for axis, dim in splits(held):
        home = home_dim(mesh, axis, x.ndim) if dim in dims else None
        if home is not None and home not in (*dims, *taken):
            placements, taken = with_axis(placements, axis, Shard(home)), [*taken, home]
    return x if placements == held else redistribute(x, placements, cause_for(op, x))


def made_whole(x: Any, dims: Sequence[int], cause: Cause) -> Any:
    """`x` with the splits of `dims` ended (an exchange that belongs to a rule); differentiable."""
    target = tuple(REPLICATE if getattr(p, "dim", None) in dims else p for p in placements_of(x))
    return redistribute(x, target, cause)


def tuple_of(value: Any, n: int) -> tuple[int, ...]:
    """An int or a sequence as n ints."""
    return _ints(value, n) if isinstance(value, int | tuple) else _ints.__wrapped__(value, n)


@lru_cache(maxsize=4096)
def _ints(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        return tuple(int(v) for v in value) * (n if len(value) == 1 else 1)
    return (int(value),) * n


def autocast(x: Any, *values: Any) -> tuple[Any, ...]:
    """Cast floating tensors as autocast would before a convolution or a matrix product."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return (x, *values)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype != torch.float64 else v
        for v in (x, *values)
    )
