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

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.parallel.account import where
from meshwright.parallel.comm import Cause
from meshwright.parallel.decided import decided
from meshwright.parallel.exchange import Fetch, Intervals, Line, Return, fetched, returned
from meshwright.parallel.functions import whole_placements
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import REPLICATE, Placements, splits, with_axis
from meshwright.parallel.mesh import sizes
from meshwright.parallel.node import Node
from meshwright.parallel.parts import to_local, to_part
from meshwright.parallel.rules.halo_conv import InputGradient, WeightGradient, Work, main_backward, main_forward, own
from meshwright.plan.filters import filters_axis
from meshwright.plan.geometry import Interval, chunk, chunks


class Filters(NamedTuple):
    """A split by filters along `axis`, which splits `dim` of the input; along `others` other dims are split."""

    axis: int
    dim: int
    others: tuple[int, ...]

    def part(self, weight: Any) -> torch.Tensor:
        """This rank's filters of a weight or bias."""
        return to_part(weight, self.axis, self.others)

    def placements(self, held: Placements) -> tuple[Placements, Placements]:
        """Those of an input so `held` while it is convolved, and of the result."""
        return with_axis(held, self.axis, REPLICATE), with_axis(held, self.axis, Shard(1))

    def convolved(
        self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None, filters: int, work: Work, cause: Cause
    ) -> Any:
        """This rank's part of all `filters` over all of `x`, a local tensor."""
        for ledger in (cause.ledger, *(running for running, _ in where.stack)):  # whoever hands the result on
            if ledger is not None:
                ledger.by_filters = True
        ways = _ways(x._spec, self.axis, self.dim, cause)
        return FilterConv.apply(to_local(x), weight, bias, filters, work, *ways)


class FilterConv(Node):
    """The convolution of an input of which each rank has a part; `ways` is what `fetched` takes to make it whole, and
    `filters` how many all ranks have."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        filters: int,
        work: Work,
        *ways: Any,
    ) -> torch.Tensor:
        whole = fetched(x, *ways).contiguous(memory_format=memory_format(x))
        ctx.filters, ctx.work, ctx.ways, ctx.has_bias = filters, work, ways, bias is not None
        ctx.save_for_backward(x, whole, weight)
        return own(main_forward(whole, weight, bias, work.conv, work.pads, work.out_sizes))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        work: Work = ctx.work
        x, whole, weight = ctx.saved_tensors
        asks_x, asks_weight = ctx.needs_input_grad[:2]
        asks_bias, rest = ctx.has_bias and ctx.needs_input_grad[2], (None,) * 5
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
        mask, room = (False, asks_weight, asks_bias), partial(_room, weight, ctx.filters, ctx.ways[-1])
        _, d_weight, d_bias = main_backward(grad, whole, weight, work.conv, work.pads, mask, room)
        return None if home is None else home(), d_weight, d_bias, *rest


def _room(part: torch.Tensor, filters: int, line: Line) -> torch.Tensor:
    """Memory for the gradient of this rank's part of a weight, within memory for that of all `filters`: there the
    gradients of the others will join it (`sync/flights.py`)."""
    whole = part.new_empty_strided((filters, *part.shape[1:]), part.stride())
    return whole.narrow(0, chunk(filters, line.ranks, line.me).lo, part.shape[0])


@decided(1)
def _ways(spec: DTensorSpec, axis: int, dim: int, cause: Cause) -> tuple[Intervals, Intervals, Line]:
    """What each rank along `axis` has of `dim`, and wants of it: all."""
    line, size = Line(spec.mesh, axis, dim, cause), spec.shape[dim]
    return chunks(size, line.ranks), (Interval(0, size),) * line.ranks, line


@decided(2)
def by_filters(x: DTensorSpec, weight: DTensorSpec, groups: int) -> Filters | None:
    """How the convolution of an input is split by filters; None if it is better split in space, or if the weight
    belongs to another plan, whose ranks share it in another way. The same on every rank."""
    if weight.mesh is not x.mesh:
        return None
    ranks, held = sizes(x.mesh), dict(splits(whole_placements(x)))
    axis = filters_axis(
        tuple(x.shape),
        tuple(weight.shape),
        groups,
        [(at, dim, ranks[at]) for at, dim in held.items() if ranks[at] > 1],
    )
    return None if axis is None else Filters(axis, held[axis], tuple(other for other in held if other != axis))
