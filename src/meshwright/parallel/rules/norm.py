"""Batch, instance, group and layer norm with the statistics of the whole sample (and batch): see `standardize.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.parallel.comm import Cause, all_gather_dim, all_reduce
from meshwright.parallel.decided import decided
from meshwright.parallel.functions import (
    as_mesh,
    cause_for,
    function,
    gathered,
    mesh_of,
    meshed,
    placements_of,
    whole_placements,
)
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import Placements, Shares, axis_of, local_shape, shares, split_axes, splits
from meshwright.parallel.mesh import sizes
from meshwright.parallel.norm_kernels import is_per_channel, moments
from meshwright.parallel.parts import from_local, laid, to_local, to_part
from meshwright.parallel.redistribute import replicate
from meshwright.parallel.rules.channel_norm import ChannelNorm
from meshwright.parallel.rules.pointwise import aligned, cut
from meshwright.parallel.rules.reduce import merge_moments
from meshwright.parallel.rules.standardize import Standardize
from meshwright.parallel.small import host, stacked, tensor
from meshwright.parallel.tensor import Layout


def affine(
    value: Any,
    view: Sequence[int],
    shape: tuple[int, ...],
    placements: Placements,
    axes: tuple[int, ...],
    cause: Cause,
) -> torch.Tensor | None:
    """A weight or bias as a local tensor that broadcasts as `view`: whole, or cut where it spans a split dim."""
    if value is None:
        return None
    local = to_local(replicate(value, cause), axes).view(list(view))  # its gradient: a summand
    return cut(local, aligned(placements, tuple(view), shape), value._spec.mesh)


class _Over(NamedTuple):
    """What statistics over some dims of a tensor are taken of."""

    values: int
    parts: Shares  # of the ranks
    among: tuple[int, ...]  # their axes
    axes: tuple[int, ...]  # all along which the tensor is split
    channels: int | None  # the axis that splits dim 1
    dims: tuple[int, ...]


@decided(1)
def _over(spec: DTensorSpec, dims: tuple[int, ...]) -> _Over:
    placements, shape = whole_placements(spec), tuple(spec.shape)
    parts = shares(sizes(spec.mesh), placements, shape, dims)
    values = math.prod(shape[dim] for dim in dims)
    among = tuple(axis for axis, _ in parts)
    return _Over(values, parts, among, split_axes(placements), axis_of(placements, 1), dims)


def _standardize(
    x: Any, weight: Any, bias: Any, view: Sequence[int], over: _Over, eps: float, cause: Cause
) -> tuple[Any, Any, Any]:
    """The local part of `x` standardised; `view` is the shape in which weight and bias broadcast. Also mean and biased
    variance, fp64 (see `small.py`)."""
    mesh, dims, local = x._spec.mesh, over.dims, to_local(x)
    even = weight is bias is None or {view[dim] for dim in dims} == {1}
    found = _channel_moments(local, mesh, over.parts, cause) if even and is_per_channel(local, dims) else None
    if found is not None:
        w, b = _per_channel(weight, over), _per_channel(bias, over)
        y = ChannelNorm.apply(local, w, b, found, over.values, eps, mesh, over.among, cause)
        mean, var = found
    else:
        w, b = (affine(v, view, tuple(x.shape), placements_of(x), over.axes, cause) for v in (weight, bias))
        y, mean, var = Standardize.apply(local, w, b, dims, even, over.values, eps, mesh, over.parts, cause)
        mean, var = host(mean), host(var)
    return y, mean, var


def _per_channel(value: Any, over: _Over) -> torch.Tensor | None:
    """A weight, bias or statistic of the channels that this rank has of an activation."""
    if value is None:
        return None
    if over.channels is None:
        return to_local(replicate(value), over.axes)
    return to_part(value, over.channels, tuple(other for other in over.axes if other != over.channels))


def _channel_moments(local: torch.Tensor, mesh: DeviceMesh, parts: Shares, cause: Cause) -> Any:
    """Those of all ranks, unless this one's values are to be centred first."""
    found, is_centred = moments(local.detach())
    return merge_moments(found, mesh, parts, cause) if is_centred else None


def _keep_order(y: torch.Tensor) -> torch.Tensor:
    """`y`, whose gradient comes in its memory order. That of torch's batch norm (2.13.0, CPU) is wrong in another
    order, and a part may be so thin that a permuted gradient has another order there alone."""
    if y.requires_grad:
        order = memory_format(y)
        y.register_hook(lambda grad: grad.contiguous(memory_format=order))
    return y


@function(F.batch_norm, torch.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Per channel over the whole batch and space; running statistics equal to those of one device."""
    x, weight, bias, running_mean, running_var = meshed(input, weight, bias, running_mean, running_var)
    for value in (weight, bias, running_mean, running_var):
        if value is not None and value._spec.mesh is not x._spec.mesh:  # of another plan: its ranks share channels so
            x = gathered(x, [1], "batch_norm")
    way, over, view, layout = _way(x._spec, training)
    cause = cause_for("batch_norm", x, weight)
    if way is _Way.PLAIN:
        mean, var, w, b = (_per_channel(value, over) for value in (running_mean, running_var, weight, bias))
        y = F.batch_norm(to_local(x), mean, var, w, b, training, 0.0 if momentum is None else momentum, eps)
        return laid(_keep_order(y), layout, cause.ledger)
    if over.values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {layout.shape}")
    kept = None if momentum is None else running_mean
    if way is _Way.PART:
        y, mean, var = _of_part(x, weight, bias, kept, over, eps)
    else:
        y, mean, var = _standardize(x, weight, bias, view, over, eps, cause)
        var = var * (over.values / (over.values - 1))
    if kept is not None and momentum is not None:
        if over.channels is not None:
            own = tensor(stacked([mean.reshape(-1), var.reshape(-1)]))
            mean, var = host(all_gather_dim(own, layout.mesh, over.channels, 1, layout.shape[1], cause))
        _update(running_mean, mean, momentum)
        _update(running_var, var, momentum)
    return laid(y, layout, cause.ledger)  # after all that is sent, see there


class _Way(Enum):
    """Of a batch norm."""

    PLAIN = auto()  # as torch does it, without statistics of this batch
    PART = auto()  # as torch does it: whoever has a channel has all of it
    SPLIT = auto()  # with the statistics of all ranks


@decided(1)
def _way(spec: DTensorSpec, training: bool) -> tuple[_Way, _Over, tuple[int, ...], Layout]:
    """Also what statistics are taken over, the shape of what is per channel, and where the result lies."""
    mesh, placements, shape = spec.mesh, whole_placements(spec), tuple(spec.shape)
    if not training or not splits(placements) or 0 in shape:  # of nothing torch takes no statistics
        way = _Way.PLAIN
    elif all(dim == 1 for _, dim in splits(placements)) and 0 not in local_shape(mesh, placements, shape):
        way = _Way.PART
    else:
        way = _Way.SPLIT
    view = (1, shape[1], *(1 for _ in shape[2:]))
    return way, _over(spec, (0, *range(2, len(shape)))), view, Layout(mesh, placements, shape)


def _of_part(x: Any, weight: Any, bias: Any, running: Any, over: _Over, eps: float) -> tuple[Any, Any, Any]:
    """Torch's own batch norm of the channels of this rank: a local result, with mean and unbiased variance if `running`
    ones are to be updated."""
    local, w, b = to_local(x), _per_channel(weight, over), _per_channel(bias, over)
    mean, var = (None if running is None else local.new_zeros(local.shape[1], dtype=running.dtype) for _ in range(2))
    y = _keep_order(F.batch_norm(local, mean, var, w, b, True, 1.0, eps))
    return y, None if mean is None else host(mean.double()), None if var is None else host(var.double())


def _update(running: Any, value: Any, momentum: float) -> None:
    """The exponential average of one device, on the replicated buffer."""
    local, value = running._local_tensor, value.reshape(-1)
    if local.dtype in (torch.float32, torch.float64):
        held = host(local)
        held += momentum * (value - held)
    else:
        local.lerp_(tensor(value).to(local.dtype), momentum)
    if running._frozen_view or local.is_inference():
        with torch.no_grad():
            running.add_(0)  # a copy goes home
    else:  # as a write to the mesh tensor does
        torch._C._increment_version((local, running))


@function(F.instance_norm, torch.instance_norm)
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Per sample and channel over the whole space."""
    mesh = mesh_of(input, weight, running_mean)
    x = gathered(as_mesh(input, mesh), [1], "instance_norm")
    weight, bias, running_mean, running_var = (as_mesh(v, mesh) for v in (weight, bias, running_mean, running_var))
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    shape = tuple(x.shape)
    count = math.prod(shape[2:])
    if count == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {shape}")
    if 0 in shape:
        return batch_norm(x, None, None, weight, bias, True, momentum, eps)
    cause, dims = cause_for("instance_norm", x, weight), tuple(range(2, len(shape)))
    view = [1, shape[1], *(1 for _ in dims)]
    mesh, placements = x._spec.mesh, placements_of(x)
    y, mean, var = _standardize(x, weight, bias, view, _over(x._spec, dims), eps, cause)
    if running_mean is not None:
        axis = axis_of(placements, 0)
        mean, var = (value.reshape(-1, shape[1]).sum(0) for value in (mean, var))
        packed = tensor(stacked([mean, var * (count / (count - 1))]))
        packed = host(all_reduce(packed, mesh, [] if axis is None else [axis], cause)) / shape[0]
        _update(running_mean, packed[0], momentum)
        _update(running_var, packed[1], momentum)
    return from_local(y, mesh, placements, shape, cause.ledger)  # after all that is sent, see there


@function(F.group_norm, torch.group_norm)
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Per sample and group of channels over the whole space."""
    mesh = mesh_of(input, weight, bias)
    x = gathered(as_mesh(input, mesh), [1], "group_norm")
    weight, bias = as_mesh(weight, mesh), as_mesh(bias, mesh)
    placements, shape = placements_of(x), tuple(x.shape)
    if shape[1] % num_groups:
        raise RuntimeError(f"group_norm: {shape[1]} channels are not divisible by num_groups={num_groups}")
    cause, axes = cause_for("group_norm", x, weight), split_axes(placements)
    if shape[0] * (shape[1] // num_groups) * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if not any(dim >= 2 for _, dim in splits(placements)):
        w, b = (None if v is None else to_local(v, axes) for v in (weight, bias))
        y = torch.group_norm(to_local(x), num_groups, w, b, eps)  # without the check, which is for the whole batch
        return from_local(y, mesh, placements, shape, cause.ledger)
    per = shape[1] // num_groups
    grouped = x.unflatten(1, (num_groups, per))
    view = [1, num_groups, per, *(1 for _ in shape[2:])]
    over = _over(grouped._spec, tuple(range(2, len(shape) + 1)))
    y, _, _ = _standardize(grouped, weight, bias, view, over, eps, cause)
    return from_local(y, mesh, placements_of(grouped), tuple(grouped.shape), cause.ledger).flatten(1, 2)


@function(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Over the trailing dims, split or not."""
    mesh = mesh_of(input, weight, bias)
    x, weight, bias = (as_mesh(v, mesh) for v in (input, weight, bias))
    placements, shape = placements_of(x), tuple(x.shape)
    trailing = len(normalized_shape)
    if tuple(normalized_shape) != shape[len(shape) - trailing :]:
        raise RuntimeError(f"layer_norm: normalized_shape {tuple(normalized_shape)} does not end the input {shape}")
    cause, axes = cause_for("layer_norm", x, weight), split_axes(placements)
    dims = tuple(range(len(shape) - trailing, len(shape)))
    if not any(dim in dims for _, dim in splits(placements)):
        w, b = (None if v is None else to_local(replicate(v), axes) for v in (weight, bias))
        y = F.layer_norm(to_local(x), list(normalized_shape), w, b, eps)
        return from_local(y, mesh, placements, shape, cause.ledger)
    view = [1] * (len(shape) - trailing) + list(normalized_shape)
    y, _, _ = _standardize(x, weight, bias, view, _over(x._spec, dims), eps, cause)
    return from_local(y, mesh, placements, shape, cause.ledger)
