"""Every position against every other: attention and pairwise distances over split positions.

Each rank keeps its own rows (queries, first points) and fetches all of what they are compared with (keys and values,
second points), which is linear in the positions; the quadratic scores never leave the rank that computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from meshwright.parallel.comm import Cause
from meshwright.parallel.functions import as_mesh, cause_for, function, mesh_of, placements_of
from meshwright.parallel.layout import REPLICATE, Placements, owned, split_axes, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import operator
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import redistribute, replicate
from meshwright.parallel.rules.aside import whole_dims
from meshwright.parallel.rules.pointwise import aligned, cut
from meshwright.parallel.rules.windows import nothing
from meshwright.parallel.tensor import like

_Parts = tuple[Placements, torch.Tensor, list[torch.Tensor]]


def _rows_against_all(rows: Any, others: Sequence[Any], cause: Cause) -> _Parts | None:
    """The layout of the result [batch ..., rows, ...], this rank's rows, and all of `others` for its batch."""
    mesh, ndim = rows._spec.mesh, rows.ndim
    batch = tuple(rows.shape[:-2])
    if ndim < 2 or any(t.ndim != ndim or tuple(t.shape[:-2]) != batch for t in others):
        return None
    layout: list[Any] = [REPLICATE] * mesh.ndim
    taken: set[int] = set()
    wishes = [(axis, dim) for t in (rows, *others) for axis, dim in splits(placements_of(t))]
    for axis, dim in sorted(wishes, key=lambda wish: wish[1] >= ndim - 2):  # batches first: they need no exchange
        target = min(dim, ndim - 2)
        if layout[axis] == REPLICATE and target not in taken and sizes(mesh)[axis] > 1:
            layout[axis] = Shard(target)
            taken.add(target)
    if not taken:
        return None
    out = tuple(layout)
    whole = tuple(REPLICATE if p == Shard(ndim - 2) else p for p in out)
    apart = tuple(axis for axis, dim in splits(out) if dim == ndim - 2)  # where gradients of `others` are summands
    return (
        out,
        to_local(redistribute(rows, out, cause)),
        [to_local(redistribute(t, whole, cause), apart) for t in others],
    )


def _one(t: torch.Tensor) -> torch.Tensor:
    """One element that hangs on `t`, for a rank without rows (see `nothing`)."""
    return t.new_zeros((1,) * t.ndim) + t.narrow(0, 0, 0).sum().to(t.dtype)


@function(F.scaled_dot_product_attention)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """[..., L, E], [..., S, E], [..., S, V] → [..., L, V]; sends keys and values along the axes that split L."""
    mesh = mesh_of(query, key, value, attn_mask)
    if dropout_p or enable_gqa or (is_causal and attn_mask is not None):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _composed(F.scaled_dot_product_attention, (query, key, value, attn_mask, dropout_p, is_causal), options)
    q, k, v = (as_mesh(t, mesh) for t in (query, key, value))
    cause = cause_for("scaled_dot_product_attention", q, k, v)
    parts = _rows_against_all(q, (k, v), cause)
    if parts is None:
        return NotImplemented
    layout, mine, (keys, values) = parts
    scores, mask = (*q.shape[:-1], k.shape[-2]), None
    if is_causal:
        span = owned(mesh, layout, q.ndim - 2, q.shape[-2])
        row = torch.arange(span.lo, span.hi, device=mine.device)
        mask = row[:, None] >= torch.arange(k.shape[-2], device=mine.device)
    elif attn_mask is not None:
        mask = to_local(replicate(as_mesh(attn_mask, mesh), cause), split_axes(layout))
        mask = cut(mask, aligned(layout, tuple(attn_mask.shape), scores), mesh)
    if mine.numel():
        out = F.scaled_dot_product_attention(mine, keys, values, mask, scale=scale)
    else:
        bias = _one(mask) if mask is not None and mask.is_floating_point() else None
        out = nothing(
            mine,
            (*mine.shape[:-1], values.shape[-1]),
            lambda one: F.scaled_dot_product_attention(one, _one(keys), _one(values), bias, scale=scale),
        )
    return from_local(out, mesh, layout, (*q.shape[:-1], v.shape[-1]), cause.ledger)


@function(torch.cdist)
def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Any:
    """[..., P, M], [..., R, M] → [..., P, R]; sends the second points along the axes that split P."""
    mesh = mesh_of(x1, x2)
    first, second = as_mesh(x1, mesh), as_mesh(x2, mesh)
    cause = cause_for("cdist", first, second)
    parts = _rows_against_all(first, (second,), cause)
    if parts is None or not math.prod(first.shape):
        return NotImplemented
    layout, mine, (points,) = parts
    if compute_mode == "use_mm_for_euclid_dist_if_necessary":  # torch looks at the sizes: here at those of the whole
        multiplies = max(first.shape[-2], second.shape[-2]) > 25
        compute_mode = "use_mm_for_euclid_dist" if multiplies else "donot_use_mm_for_euclid_dist"
    if mine.numel():
        out = torch.cdist(mine, points, p, compute_mode)
    else:
        shape = (*mine.shape[:-1], points.shape[-2])
        out = nothing(mine, shape, lambda one: torch.cdist(one, _one(points), p, compute_mode))
    return from_local(out, mesh, layout, (*first.shape[:-1], second.shape[-2]), cause.ledger)


@operator(torch.ops.aten._safe_softmax.default)
def safe_softmax(func: Any, args: Any, kwargs: Any) -> Any:
    """Softmax in which a row that is masked entirely is zero; rows are whole here."""
    x, dim = args[:2]
    return like(func(x._local_tensor, dim, *args[2:], **kwargs), x) if whole_dims(x, dim) else NotImplemented


def _composed(plain: Any, args: Any, kwargs: Any) -> Any:
    """Attention out of products and a softmax, which have rules; the fused kernels have none."""
    with sdpa_kernel(SDPBackend.MATH), torch._C.DisableTorchFunctionSubclass():
        return plain(*args, **kwargs)


@function(F.multi_head_attention_forward)
def multi_head(*args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention`: its own attention is not routed to the rule above."""
    return _composed(F.multi_head_attention_forward, args, kwargs)
