"""Elementwise work on parts that lie alike: the commonest by far, done without asking more than it needs."""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.copies import written
from meshwright.parallel.layout import partial_axes
from meshwright.parallel.tensor import MeshOps, under, wrap


def at_once(func: Any, args: Any, kwargs: Any, writes: bool, on_summands: bool) -> Any:
    """The result of an elementwise ATen operator with one result, or NotImplemented where the rules have to be asked:
    for operands of other layouts, copies of views, summands (unless `on_summands`), and options that are no numbers."""
    first: Any = None
    parts = []
    for value in args:
        if isinstance(value, MeshOps):
            if value._frozen_view or (first is not None and value._spec is not first._spec):
                return NotImplemented
            first = value if first is None else first
            parts.append(value._local_tensor)
        elif isinstance(value, torch.Tensor | list | tuple):
            return NotImplemented
        else:
            parts.append(value)
    for value in kwargs.values():
        if not isinstance(value, int | float):
            return NotImplemented
    if first is None or (partial_axes(tuple(first._spec.placements)) and not on_summands):
        return NotImplemented
    if writes:
        if not isinstance(args[0], MeshOps):
            return NotImplemented
        func(*parts, **kwargs)
        written(args[0], False)
        return args[0]
    out, local = func(*parts, **kwargs), first._local_tensor
    if out.dtype is local.dtype and out.shape == local.shape and out.stride() == local.stride():
        return under(out, first._spec, first._ledger)
    return wrap(out, first._spec.mesh, tuple(first._spec.placements), tuple(first._spec.shape), first._ledger)
