"""Matrix products. Rows of the left factor stay split; a split contraction gives summands, summed when needed."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from meshwright.parallel.layout import PARTIAL, REPLICATE, Placements
from meshwright.parallel.operators import cause_of, operator, placed, summed
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.tensor import is_mesh, wrap

aten = torch.ops.aten


def _plan(left: Placements, right: Placements, batch: int) -> tuple[Placements, Placements, Placements]:
    """Per axis: how left, right and product are placed. `batch` leading dims are common to all three."""
    rows, inner = batch, batch + 1
    a: list[Any] = []
    b: list[Any] = []
    c: list[Any] = []
    for p, q in zip(left, right, strict=True):
        triple: tuple[Any, Any, Any]
        if isinstance(p, Shard) and p.dim < batch:
            triple = (p, p, p)
        elif (isinstance(p, Shard) and p.dim == inner) or (isinstance(p, Replicate) and q == Shard(rows)):
            triple = (Shard(inner), Shard(rows), PARTIAL)
        elif isinstance(p, Shard) and p.dim == rows:
            triple = (p, REPLICATE, p)
        elif isinstance(q, Shard) and q.dim == inner:
            triple = (REPLICATE, q, q)
        elif isinstance(q, Shard):
            triple = (q, q, q)
        else:
            triple = (REPLICATE, REPLICATE, REPLICATE)
        a.append(triple[0])
        b.append(triple[1])
        c.append(triple[2])
    return tuple(a), tuple(b), tuple(c)


@operator(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
def product(func: Any, args: Any, kwargs: Any) -> Any:
    """`mm`, `bmm`, and with an added term `addmm`, `baddbmm`."""
    added = func in (aten.addmm.default, aten.baddbmm.default)
    term: Any = args[0] if added else None
    left, right = args[1:3] if added else args[:2]
    reference = next(t for t in (left, right, term) if is_mesh(t))
    mesh, cause = reference._spec.mesh, cause_of(func, args)
    whole = (REPLICATE,) * mesh.ndim
    places = [tuple(t._spec.placements) if is_mesh(t) else whole for t in (left, right)]
    batch = left.ndim - 2
    first, second, out = _plan(places[0], places[1], batch)
    parts = [placed(t, p, cause) if is_mesh(t) else cut(t, p, mesh) for t, p in ((left, first), (right, second))]
    shape = (*left.shape[:-1], right.shape[-1])
    local = (torch.bmm if batch else torch.mm)(*parts)
    ledger = next((t._ledger for t in (left, right, term) if is_mesh(t) and t._ledger), None)
    result: Any = wrap(local, mesh, out, tuple(shape), ledger)
    if not added:
        return result
    if any(isinstance(p, Partial) for p in out):
        target = tuple(REPLICATE if isinstance(p, Partial) else p for p in out)
        result = wrap(placed(result, target, cause), mesh, target, tuple(shape), ledger)
    if kwargs.get("beta", 1) == 0:  # then the term is ignored, even where it is not a number
        return result if kwargs.get("alpha", 1) == 1 else result * kwargs["alpha"]
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    result = result if alpha == 1 else result * alpha
    return result + (term if beta == 1 else term * beta)


@operator(aten.mv.default)
def matrix_vector(func: Any, args: Any, kwargs: Any) -> Any:
    """A product with one column."""
    left, right = args
    column = aten.unsqueeze.default(right, 1)
    out = product(aten.mm.default, (left, column), {})
    return aten.squeeze.dim(summed(out, cause_of(func, args)), 1)


@operator(aten.dot.default)
def dot(func: Any, args: Any, kwargs: Any) -> Any:
    """The sum of the products of corresponding elements."""
    return aten.sum.default(aten.mul.Tensor(*args))
