"""Root-mean-square norm over trailing dims, split or not: one sum of squares travels, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.functions import as_mesh, cause_for, function, mesh_of, placements_of
from meshwright.parallel.layout import split_axes, splits
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import replicate
from meshwright.parallel.rules.norm import affine
from meshwright.parallel.rules.standardize import Total


@function(F.rms_norm, torch.rms_norm)
def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """`x / sqrt(mean(x²) + eps) * weight` over the trailing dims (Zhang and Sennrich 2019)."""
    mesh = mesh_of(input, weight)
    x, weight = as_mesh(input, mesh), as_mesh(weight, mesh)
    placements, shape, trailing = placements_of(x), tuple(x.shape), len(normalized_shape)
    if tuple(normalized_shape) != shape[len(shape) - trailing :]:
        raise RuntimeError(f"rms_norm: normalized_shape {tuple(normalized_shape)} does not end the input {shape}")
    cause, axes = cause_for("rms_norm", x, weight), split_axes(placements)
    dims = tuple(range(len(shape) - trailing, len(shape)))
    mine = tuple(axis for axis, dim in splits(placements) if dim in dims)
    local = to_local(x)
    if not mine:
        w = None if weight is None else to_local(replicate(weight, cause), axes)
        y = F.rms_norm(local, list(normalized_shape), w, eps)
        return from_local(y, mesh, placements, shape, cause.ledger)
    half = local.dtype in (torch.bfloat16, torch.float16)
    wide = local.float() if half else local
    small = torch.finfo(wide.dtype).eps if eps is None else eps
    square = Total.apply((wide * wide).sum(dims, keepdim=True), mesh, mine, cause) / math.prod(normalized_shape)
    y = wide * (square + small).rsqrt()
    w = affine(weight, [1] * (len(shape) - trailing) + list(normalized_shape), shape, placements, axes, cause)
    return from_local((y if w is None else y * w).to(local.dtype), mesh, placements, shape, cause.ledger)
