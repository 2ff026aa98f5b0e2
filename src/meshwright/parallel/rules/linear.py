"""Fully connected layers: work on the last dim; all other dims keep their splits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.functions import as_mesh, autocast, cause_for, function, made_whole, mesh_of, placements_of
from meshwright.parallel.layout import split_axes
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import replicate


@function(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`x @ weight.T + bias`; a split last dim (a flattened split one) is made whole, an exchange of that layer."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = autocast(*(as_mesh(v, mesh) for v in (input, weight, bias)))
    cause = cause_for("linear", x, weight)
    x = made_whole(x, [x.ndim - 1], cause)
    placements, axes = placements_of(x), split_axes(placements_of(x))
    w = to_local(replicate(weight, cause), axes)
    b = None if bias is None else to_local(replicate(bias, cause), axes)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(to_local(x), w, b)
    shape = (*x.shape[:-1], *weight.shape[:-1])
    return from_local(y, mesh, placements, shape, cause.ledger)
