"""Triangles and diagonals of the planes of two dims."""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.layout import local_shape, moved, owned
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.rules.aside import aside
from meshwright.parallel.rules.common import parts
from meshwright.parallel.rules.reduce import arguments
from meshwright.parallel.tensor import like, wrap

aten = torch.ops.aten


@operator(aten.tril.default, aten.triu.default)
def triangle(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise: which positions stay follows from where this rank's part begins."""
    x, diagonal = args[0], args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
    mesh, placements, shape = parts(x)
    row, column = (owned(mesh, placements, len(shape) + d, shape[d]).lo for d in (-2, -1))
    return like(func(x._local_tensor, diagonal + row - column), x)


@operator(aten.diagonal.default)
def diagonal(func: Any, args: Any, kwargs: Any) -> Any:
    """[..., a, ..., b, ...] → [..., diagonal]; splits of the two dims move to others (all-to-all)."""
    x = args[0]
    a = arguments(func, args, kwargs)
    offset, ndim = a["offset"], x.ndim
    dims = (a["dim1"] % ndim, a["dim2"] % ndim)
    there = aside(x, dims, cause_of(func, args))
    if there is None:
        return NotImplemented
    mesh, placements, shape = parts(there)
    kept = [d for d in range(ndim) if d not in dims]
    target = moved(placements, tuple(kept.index(d) if d in kept else None for d in range(ndim)))
    out = func(there._local_tensor, offset, *dims)
    whole = (*(shape[d] for d in kept), out.shape[-1])
    return wrap(out, mesh, target, whole, x._ledger, frozen_view=there is not x)


@operator(aten.diagonal_backward.default)
def diagonal_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient put back into zeros."""
    grad, shape, offset, first, second = args
    there = aside(grad, grad.ndim - 1, cause_of(func, args))
    if there is None:
        return NotImplemented
    ndim = len(shape)
    kept = [d for d in range(ndim) if d not in (first % ndim, second % ndim)]
    mesh, placements, _ = parts(there)
    target = moved(placements, (*kept, None))
    local = list(local_shape(mesh, target, tuple(shape)))
    return wrap(func(there._local_tensor, local, offset, first, second), mesh, target, tuple(shape), grad._ledger)
