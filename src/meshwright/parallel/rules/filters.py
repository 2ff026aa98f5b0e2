"""Convolutions with more weights than activations, split by filters instead of space.

Near the end of an image network little space is left and most of the weights. Split in space every rank reads all
weights, computes rows near the cuts anew, and has a summand of every gradient. Split by filters it gathers the input,
which is the smaller, and convolves all of it with its share of the filters, whose gradient is then complete: ranks hand
it to each other, half of what a sum takes. The result is split by channels, where batch norm needs no other rank for
its statistics; rules that need channels whole move the split back to space (`functions.gathered`).

Sources: Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014), for the idea; Gholami et
al., "Integrated model, batch, and domain parallelism in training neural networks" (SPAA 2018), for the bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from meshwright.cluster.process_group import when_leaving
from meshwright.parallel.comm import Cause
from meshwright.parallel.exchange import Fetch, Line, Return, fetched, returned
from meshwright.parallel.functions import placements_of
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import REPLICATE, Placements, splits, with_axis
from meshwright.parallel.mesh import sizes
from meshwright.parallel.redistribute import to_local, to_part
from meshwright.parallel.rules.halo_conv import InputGradient, WeightGradient, Work, main_backward, main_forward, own
from meshwright.plan.filters import filters_axis
from meshwright.plan.geometry import Interval, chunks


class Filters(NamedTuple):
    """A split by filters along `axis`, which splits `dim` of the input; along `others` other dims are split."""

    axis: int
    dim: int
    others: tuple[int, ...]

    def placements(self, x: Any) -> tuple[Placements, Placements]:
        """Those of the input while it is convolved, and of the result."""
        held = placements_of(x)
        return with_axis(held, self.axis, REPLICATE), with_axis(held, self.axis, Shard(1))

    def part(self, weight: Any) -> torch.Tensor:
        """This rank's filters of a weight or bias."""
        return to_part(weight, self.axis, self.others)

    def convolved(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None, work: Work, cause: Cause) -> Any:
        """This rank's filters over all of `x`, a local tensor."""
        line = Line(x._spec.mesh, self.axis, self.dim, cause)
        if cause.ledger is not None:
            cause.ledger.by_filters = True
        return FilterConv.apply(to_local(x), weight, bias, work, line, x.shape[self.dim])


class FilterConv(Function):
    """The convolution of an input of which each rank along `line` has a part, `size` positions in all."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: Work, line: Line, size: int
    ) -> torch.Tensor:
        ways = chunks(size, line.ranks), (Interval(0, size),) * line.ranks, line
        whole = fetched(x, *ways).contiguous(memory_format=memory_format(x))
        ctx.work, ctx.ways, ctx.has_bias = work, ways, bias is not None
        ctx.save_for_backward(x, whole, weight)
        return own(main_forward(whole, weight, bias, work.conv, work.pads, work.out_sizes))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        work: Work = ctx.work
        x, whole, weight = ctx.saved_tensors
        asks_x, asks_weight = ctx.needs_input_grad[:2]
        asks_bias, rest = ctx.has_bias and ctx.needs_input_grad[2], (None,) * 3
        d_weight, home = None, None
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            d_bias = grad.sum((0, *range(2, grad.ndim))) if asks_bias else None
            if asks_weight:
                d_weight = WeightGradient.apply(grad, Fetch.apply(x, *ctx.ways), weight.detach(), work)
            d_x = Return.apply(InputGradient.apply(grad, weight, whole, work), *ctx.ways) if asks_x else None
            return d_x, d_weight, d_bias, *rest
        if asks_x:
            d_whole = main_backward(grad, whole, weight, work.conv, work.pads, (True, False, False))[0]
            assert d_whole is not None
            home = returned(d_whole, *ctx.ways)  # behind the gradient of the weight
        mask = (False, asks_weight, asks_bias)
        _, d_weight, d_bias = main_backward(grad, whole, weight, work.conv, work.pads, mask)
        return None if home is None else home(), d_weight, d_bias, *rest


def by_filters(x: Any, weight: Any, groups: int) -> Filters | None:
    """How the convolution of mesh tensor `x` is split by filters; None if it is better split in space, or if the weight
    belongs to another plan, whose ranks share it in another way."""
    if weight._spec.mesh is not x._spec.mesh:
        return None
    return _chosen(x._spec.mesh, placements_of(x), tuple(x._spec.shape), tuple(weight._spec.shape), groups)


@lru_cache(maxsize=4096)
def _chosen(
    mesh: DeviceMesh, placements: Placements, shape: tuple[int, ...], weight_shape: tuple[int, ...], groups: int
) -> Filters | None:
    """The same on every rank."""
    held = dict(splits(placements))
    axis = filters_axis(
        shape, weight_shape, groups, [(at, dim, n) for at, dim in held.items() if (n := sizes(mesh)[at]) > 1]
    )
    return None if axis is None else Filters(axis, held[axis], tuple(other for other in held if other != axis))


when_leaving(_chosen.cache_clear)  # it holds meshes, which hold groups
