"""What the rules that rearrange dims share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause
from meshwright.parallel.exchange import Line, fetch
from meshwright.parallel.layout import Placements, axis_of
from meshwright.plan.geometry import Interval

aten = torch.ops.aten


def parts(x: Any) -> tuple[DeviceMesh, Placements, tuple[int, ...]]:
    return x._spec.mesh, tuple(x._spec.placements), tuple(x._spec.shape)


def positive(dims: Sequence[int], ndim: int) -> list[int]:
    return [dim % ndim if ndim else 0 for dim in dims]


def fetch_chunks(x: Any, local: torch.Tensor, dim: int, wanted: tuple[Interval, ...], cause: Cause) -> torch.Tensor:
    """Below autograd: this rank's wanted interval of split dim `dim` of mesh tensor `x` (local part `local`)."""
    mesh, placements, shape = parts(x)
    axis = axis_of(placements, dim)
    assert axis is not None
    return fetch(local, shape[dim], wanted, Line(mesh, axis, dim, cause))
