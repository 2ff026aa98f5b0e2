"""Losses on split tensors: every rank takes the loss of its part, then one scalar is summed over the ranks.

The denominator of a mean is always global (all positions, all weights, all targets that are not ignored), so uneven
and empty parts count as they should. Losses that torch composes of elementwise work and sums (L1, KL divergence,
hinge, margins, Poisson, Gaussian, cosine, class probabilities ...) need no rule of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.functions import as_mesh, cause_for, function, gathered, mesh_of, placements_of
from meshwright.parallel.layout import PARTIAL, REPLICATE, Placements, moved, replicated, split_axes, splits
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import redistribute, replicate
from meshwright.parallel.rules.pointwise import common_layout, cut, pointwise, to_parts
from meshwright.parallel.rules.reduce import arguments, vector_norm
from meshwright.parallel.tensor import MeshOps, ledger_of, mesh_tensors, wrap

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
NONE, MEAN, SUM = 0, 1, 2  # torch's numbers for the reductions


def _replaced(args: Any, tensors: list[torch.Tensor]) -> list[Any]:
    """The arguments with their tensors, in order, replaced by `tensors`."""
    parts = iter(tensors)
    return [next(parts) if isinstance(a, torch.Tensor) else a for a in args]


@operator(
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
def elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """A loss of corresponding positions."""
    a = arguments(func, args, kwargs)
    reduction, values = a["reduction"], list(a.values())
    if reduction == NONE:
        return pointwise(func, tuple(values), {})
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    shape = tuple(torch.broadcast_shapes(*(t.shape for t in tensors)))
    meshed, cause = mesh_tensors(tensors), cause_of(func, args)
    mesh, target = meshed[0]._spec.mesh, common_layout(meshed, shape)
    a["reduction"] = SUM
    parts = to_parts(tensors, shape, target, mesh, cause)
    dtype = parts[0].dtype
    if dtype in HALF:  # the sum of a volume in half precision would lose what the mean keeps
        a["reduction"] = NONE
    total = func(*_replaced(a.values(), parts))
    if dtype in HALF:
        total = total.sum(dtype=torch.float32)
    total = all_reduce(total, mesh, split_axes(target), cause)
    if reduction == MEAN:
        total = total / math.prod(shape)
    return wrap(total.to(dtype), mesh, replicated(mesh), None, ledger_of(meshed))


@operator(
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.binary_cross_entropy_backward.default,
)
def elementwise_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of such a loss is local, but for the global denominator of the mean."""
    a = arguments(func, args, kwargs)
    if a["reduction"] == MEAN:
        a["grad_output"] = pointwise(aten.div.Tensor, (a["grad_output"], max(1, a["self"].numel())), {})
        a["reduction"] = SUM
    return pointwise(func, tuple(a.values()), {})


@operator(aten.log_sigmoid_forward.default)
def log_sigmoid(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise; its second result is a buffer of the kernel, empty on some devices."""
    (x,) = args
    mesh, placements = x._spec.mesh, placements_of(x)
    out, buffer = func(x._local_tensor)
    y = wrap(out, mesh, placements, tuple(x.shape), x._ledger)
    if buffer.shape != out.shape:
        return y, wrap(buffer, mesh, replicated(mesh))
    return y, wrap(buffer, mesh, placements, tuple(x.shape), x._ledger)


@operator(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise, with the kernel's buffer as it is."""
    grad, x, buffer = args
    mesh, placements, shape = x._spec.mesh, placements_of(x), tuple(x.shape)
    part, *_ = to_parts([grad], shape, placements, mesh, cause_of(func, args))
    return wrap(func(part, x._local_tensor, buffer._local_tensor), mesh, placements, shape, x._ledger)


@operator(aten.norm.ScalarOpt_dim)
def norm(func: Any, args: Any, kwargs: Any) -> Any:
    """The older name of the vector norm, under pairwise distance and triplet losses."""
    a = arguments(func, args, kwargs)
    return vector_norm(
        aten.linalg_vector_norm.default,
        (a["self"], 2 if a["p"] is None else a["p"], a["dim"]),
        {"keepdim": a["keepdim"]},
    )


def across_ranks(local: torch.Tensor, mesh: DeviceMesh, axes: tuple[int, ...], cause: Cause) -> torch.Tensor:
    """The sum of a plain tensor over the ranks along `axes`: plain, equal on all of them.

    Differentiable: the gradient of the sum, equal on all ranks, is the gradient of every summand.
    """
    placements = tuple(PARTIAL if axis in axes else REPLICATE for axis in range(mesh.ndim))
    part = from_local(local, mesh, placements, tuple(local.shape), cause.ledger)
    return to_local(redistribute(part, replicated(mesh), cause))


def _placed(value: Any, placements: Placements, mesh: DeviceMesh, cause: Cause) -> torch.Tensor:
    """This rank's part of a plain (replicated) or mesh tensor under `placements`; differentiable."""
    if not isinstance(value, MeshOps) and not value.requires_grad:
        return cut(value, placements, mesh)
    return to_local(redistribute(as_mesh(value, mesh), placements, cause))


def _layout(x: Any, target: Any, mapping: tuple[int | None, ...]) -> Placements:
    """The layout of the input for a loss over classes: its own, or that of the target if only that is split.

    `mapping` says which dim of the target each dim of the input is; None: the classes.
    """
    own = placements_of(x)
    if splits(own) or not isinstance(target, MeshOps):
        return own
    back = {new: old for old, new in enumerate(mapping) if new is not None}
    return tuple(Shard(back[p.dim]) if isinstance(p, Shard) else REPLICATE for p in placements_of(target))


def _denominator(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """The local weight of the targets that are not ignored."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(dtype)
    return (weight.detach().to(dtype)[target.masked_fill(~valid, 0)] * valid).sum()


def _over_classes(
    native: Any, x: Any, target: Any, weight: Any, ignore_index: int, reduction: str, options: dict[str, Any]
) -> Any:
    """A loss over dim 1 (dim 0 of a single sample) with targets of class indices or of class probabilities."""
    mesh = mesh_of(x, target, weight)
    x, weight = as_mesh(x, mesh), as_mesh(weight, mesh)
    name = native.__name__
    classes = 0 if x.ndim == 1 else 1
    soft = tuple(target.shape) == tuple(x.shape)  # how torch tells probabilities from indices
    mapping = tuple(None if d == classes else d - (d > classes) for d in range(x.ndim))
    out_shape = tuple(size for d, size in enumerate(x.shape) if d != classes)
    if not soft and tuple(target.shape) != out_shape:
        raise RuntimeError(
            f"{name}: an input of shape {tuple(x.shape)} with {x.shape[classes]} classes in dim {classes} needs a "
            f"target of shape {out_shape}, not {tuple(target.shape)}"
        )
    x = gathered(x, [classes], name)
    cause = cause_for(name, x, target)
    layout = placements_of(x) if soft else _layout(x, target, mapping)
    placements = tuple(p if isinstance(p, Shard) else REPLICATE for p in layout)  # summands are summed first
    out_placements = moved(placements, mapping)
    axes = split_axes(placements)
    x_part = to_local(redistribute(x, placements, cause))
    target_part = _placed(target, placements if soft else out_placements, mesh, cause)
    w = None if weight is None else to_local(replicate(weight), axes)
    options = {**options, "weight": w, "ignore_index": ignore_index}
    if reduction == "none":
        return from_local(
            native(x_part, target_part, reduction="none", **options), mesh, out_placements, out_shape, cause.ledger
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    half = x_part.dtype in HALF and not torch.is_autocast_enabled(x_part.device.type)
    total = native(x_part, target_part, reduction="none" if half else "sum", **options)
    dtype = total.dtype
    total = total.sum(dtype=torch.float32) if half else total
    if soft or reduction == "sum":
        total = across_ranks(total, mesh, axes, cause)
        if reduction == "mean":
            total = total / (x.numel() // max(1, x.shape[classes]))
    else:
        count = _denominator(target_part, w, ignore_index, total.dtype)
        total, count = across_ranks(torch.stack([total, count]), mesh, axes, cause).unbind()
        total = total / count
    return from_local(total.to(dtype), mesh, replicated(mesh), (), cause.ledger)


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """`reduction`, or what the two older arguments of torch mean."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


@function(F.cross_entropy)
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Cross-entropy of logits, all forms of targets, weights, smoothing and reductions."""
    options = {"label_smoothing": label_smoothing}
    reduction = _reduction(size_average, reduce, reduction)
    return _over_classes(F.cross_entropy, input, target, weight, ignore_index, reduction, options)


@function(F.nll_loss)
def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    """Negative log likelihood of class indices."""
    reduction = _reduction(size_average, reduce, reduction)
    return _over_classes(F.nll_loss, input, target, weight, ignore_index, reduction, {})
