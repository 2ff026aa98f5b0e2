"""Losses of whole samples (multi-margin), the forms of class losses below `torch.nn.functional`, and weighted L1."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

from meshwright.parallel.functions import as_mesh, cause_for, function, gathered, mesh_of, placements_of
from meshwright.parallel.layout import REPLICATE, replicated, split_axes
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import redistribute, replicate
from meshwright.parallel.rules.loss import _reduction, across_ranks, cross_entropy, nll_loss

_NAMES = ("none", "mean", "sum")  # of torch's numbers
_NN: Any = torch._C._nn  # the operators as torch.nn.functional calls them


def _over_samples(native: Any, x: Any, target: Any, weight: Any, reduction: str, options: dict[str, Any]) -> Any:
    """A loss of each sample (dim 0 of two), whose classes are whole: local, then one sum over the ranks."""
    mesh, name = mesh_of(x, target, weight), native.__name__
    x, target, weight = (as_mesh(v, mesh) for v in (x, target, weight))
    x = gathered(x, [x.ndim - 1], name)
    cause = cause_for(name, x, target)
    placements = tuple(p if isinstance(p, Shard) else REPLICATE for p in placements_of(x))
    axes, samples = split_axes(placements), x.shape[0] if x.ndim == 2 else 1
    if tuple(target.shape[:1]) != tuple(x.shape[:1]) and x.ndim == 2:
        raise RuntimeError(f"{name}: {tuple(target.shape)} targets for an input of shape {tuple(x.shape)}")
    if weight is not None:
        options = {**options, "weight": to_local(replicate(weight, cause), axes)}
    parts = to_local(redistribute(x, placements, cause)), to_local(redistribute(target, placements, cause))
    loss = native(*parts, reduction="none", **options)
    if reduction == "none":
        return from_local(loss, mesh, placements, tuple(x.shape[:-1]), cause.ledger)
    if reduction not in _NAMES:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    total = across_ranks(loss.sum(), mesh, axes, cause)
    if reduction == "mean":
        total = total / samples
    return from_local(total, mesh, replicated(mesh), (), cause.ledger)


@function(F.multi_margin_loss)
def multi_margin_loss(
    input: Any,
    target: Any,
    p: int = 1,
    margin: float = 1.0,
    weight: Any = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """[N, C] against class indices [N]."""
    reduction = _reduction(size_average, reduce, reduction)
    return _over_samples(F.multi_margin_loss, input, target, weight, reduction, {"p": p, "margin": margin})


@function(F.multilabel_margin_loss)
def multilabel_margin_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """[N, C] against class indices [N, C], of which those before the first −1 count."""
    reduction = _reduction(size_average, reduce, reduction)
    return _over_samples(F.multilabel_margin_loss, input, target, None, reduction, {})


@function(_NN.cross_entropy_loss)
def cross_entropy_loss(
    self: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """The operator under `F.cross_entropy`."""
    return cross_entropy(self, target, weight, None, ignore_index, None, _NAMES[reduction], label_smoothing)


@function(_NN.nll_loss_nd, _NN.nll_loss, _NN.nll_loss2d)
def nll_loss_nd(self: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    """The operators under `F.nll_loss`."""
    return nll_loss(self, target, weight, None, ignore_index, None, _NAMES[reduction])


def _argument(function: Any, name: str) -> Any:
    """What `name` was in the call of `function` that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame.f_locals.get(name) if frame.f_code is function.__code__ else None


@function(F.l1_loss)
def l1_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """The weighted form. torch (2.13) drops `weight` on the way to a tensor subclass, so it is read from the call."""
    weight = _argument(F.l1_loss, "weight") if weight is None else weight
    if weight is None:
        return NotImplemented
    if tuple(weight.shape) != tuple(input.shape):
        raise ValueError("Weights and input must have the same size.")
    reduction, errors = _reduction(size_average, reduce, reduction), (input - target).abs() * weight
    if reduction == "none":
        return errors
    if reduction not in _NAMES:
        raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    return errors.sum() / weight.sum() if reduction == "mean" else errors.sum()
