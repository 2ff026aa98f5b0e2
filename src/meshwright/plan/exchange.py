"""The exchange as arithmetic: what every rank sends in a training step, without a process group.

    window    Σ over split dims of the planes that others read × the part's other extents × channels × bytes
    whole     where space ends every rank receives every other rank's part
    gradient  2 (p − 1) / p × the parameters that p ranks used on different data: an all-reduce, in buckets

Split dims are exchanged one after the other and a later one carries what earlier ones brought, so corners need no
message of their own. Average pooling is a sum over lines: dims that need no other rank go first and are shorter
when the others are exchanged. Backward sends home what forward received. The intervals are those of `plan.geometry`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from meshwright.errors import UnsupportedError
from meshwright.plan.filters import filters_axis
from meshwright.plan.geometry import chunk, chunks, pools_early, transfers, window
from meshwright.plan.layers import Layer, Network, Taps, Weight
from meshwright.plan.plan import Plan

BUCKET_BYTES = 8 << 20  # large enough to amortise a message, small enough to start before backward ends
SMALL_BUCKET_BYTES = 1 << 17  # for small models: below this a message costs more than it hides
FEWEST_BUCKETS = 8  # so that of a small model, too, most is summed while backward runs


class Sent(NamedTuple):
    """What one rank sends. A collective counts as a ring sends it: a gather is p − 1 messages, an all-reduce one."""

    nbytes: int = 0
    messages: int = 0

    def plus(self, other: Sent) -> Sent:
        return Sent(self.nbytes + other.nbytes, self.messages + other.messages)


def total(parts: Iterable[Sent]) -> Sent:
    """The sum."""
    out = Sent()
    for part in parts:
        out = out.plus(part)
    return out


@dataclass(frozen=True)
class Exchange:
    """What one rank sends for one layer; `elements` are those of the input that it owns."""

    layer: Layer
    forward: Sent
    backward: Sent
    elements: int


@dataclass(frozen=True)
class RankStep:
    """What one rank sends in a step: its layers in the order they run, and the sum of the gradients."""

    rank: int
    exchanges: tuple[Exchange, ...]
    reduction: Sent

    @property
    def forward(self) -> Sent:
        return total(exchange.forward for exchange in self.exchanges)

    @property
    def backward(self) -> Sent:
        """Without the gradients of parameters."""
        return total(exchange.backward for exchange in self.exchanges)


def planned(network: Network, plan: Plan) -> tuple[RankStep, ...]:
    """What every rank of `plan` sends in one forward and backward of `network` whose loss needs no exchange.

    Raises `UnsupportedError` where a convolution is split by filters (`plan.filters`), which is not planned yet.
    """
    for layer in network.layers:
        split = [(axis, dim, plan.axes[axis].size) for axis, dim in _split(plan, len(layer.shape))]
        if layer.weight and filters_axis(layer.shape, layer.weight, layer.groups, split) is not None:
            raise UnsupportedError(
                f"layer {layer.name!r}: a convolution of {layer.shape} by {layer.weight} is split by filters under "
                f"{plan}, whose exchange is not planned yet"
            )
    return tuple(
        RankStep(rank, tuple(_exchange(layer, plan, rank) for layer in network.layers), reduction)
        for reduction in [_reduction(network.weights, plan)]
        for rank in range(plan.ranks)
    )


def _split(plan: Plan, ndim: int) -> list[tuple[int, int]]:
    """(axis, dim) of the axes that split a tensor of `ndim` dims."""
    found = enumerate(plan.dims(ndim))
    return [(axis, dim) for axis, dim in found if dim is not None and plan.axes[axis].size > 1]


def _exchange(layer: Layer, plan: Plan, rank: int) -> Exchange:
    place, split = plan.coordinates(rank), _split(plan, len(layer.shape))
    extents = list(layer.shape)
    for axis, dim in split:
        extents[dim] = chunk(layer.shape[dim], plan.axes[axis].size, place[axis]).size
    elements = math.prod(extents)
    space = [(axis, dim) for axis, dim in split if dim >= 2]
    if not layer.taps:
        return Exchange(layer, total(_gathers(layer, plan, space, extents)), Sent(), elements)
    # convolution exchanges the last dim first, pooling the first
    space.sort(key=lambda entry: entry[1], reverse=layer.op == "convolution")
    shorter = _pool_near(layer, plan, space, place, extents) if layer.op == "avg_pool" else set()
    forward, backward = Sent(), Sent()
    for axis, dim in space:
        cut = _cut(layer.shape[dim], layer.out[dim], layer.taps[dim - 2], plan.axes[axis].size)[place[axis]]
        plane_bytes = math.prod(size for other, size in enumerate(extents) if other != dim) * layer.itemsize
        if plane_bytes:
            forward = forward.plus(Sent(sum(cut.sent) * plane_bytes, len(cut.sent)))
            backward = backward.plus(Sent(sum(cut.received) * plane_bytes, len(cut.received)))
        if dim not in shorter:
            extents[dim] = cut.wanted
    return Exchange(layer, forward, backward if layer.trains_input else Sent(), elements)


def _pool_near(
    layer: Layer, plan: Plan, space: Sequence[tuple[int, int]], place: Sequence[int], extents: list[int]
) -> set[int]:
    """Average pooling sums first along the dims that need no other rank (but halves, which would round in between).

    These are returned, and `extents` are shorter there.
    """
    shorter = set()
    parts = dict.fromkeys(range(2, len(layer.shape)), (1, 0)) | {
        dim: (plan.axes[axis].size, place[axis]) for axis, dim in space
    }
    cuts = {dim: _cut(layer.shape[dim], layer.out[dim], layer.taps[dim - 2], n) for dim, (n, _) in parts.items()}
    for dim, cut in cuts.items():
        tap, size, out = layer.taps[dim - 2], layer.shape[dim], layer.out[dim]
        if (
            layer.itemsize >= 4
            and not any(side.sent for side in cut)
            and pools_early(tap.kernel, tap.stride, size, out)
        ):
            extents[dim] = chunk(out, *parts[dim]).size
            shorter.add(dim)
    return shorter


class _Cut(NamedTuple):
    """One rank's side of a split dim: planes that it reads, and those of each piece that it sends and receives."""

    wanted: int
    sent: list[int]
    received: list[int]


@lru_cache(maxsize=1024)
def _cut(size: int, out: int, taps: Taps, parts: int) -> list[_Cut]:
    """For each rank along an axis that splits a dim of `size` (results: `out`)."""
    options = (taps.kernel, taps.stride, taps.padding, taps.dilation)
    wanted = tuple(window(span, size, *options) for span in chunks(out, parts))
    cuts = [_Cut(span.size, [], []) for span in wanted]
    for move in transfers(chunks(size, parts), wanted):
        if move.source != move.target:
            cuts[move.source].sent.append(move.span.size)
            cuts[move.target].received.append(move.span.size)
    return cuts


def _gathers(layer: Layer, plan: Plan, space: Sequence[tuple[int, int]], extents: list[int]) -> Iterator[Sent]:
    """Space made whole, axis by axis; backward every rank has the whole gradient already."""
    for axis, dim in space:
        others = plan.axes[axis].size - 1
        nbytes = math.prod(extents) * layer.itemsize
        yield Sent(others * nbytes, others if nbytes else 0)
        extents[dim] = layer.shape[dim]


def _reduction(weights: Sequence[Weight], plan: Plan) -> Sent:
    """Gradients of parameters, in the buckets of `sync.reducer`."""
    found = []
    for bucket in _buckets(weights):
        groups: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
        for weight in bucket:
            axes = () if weight.meets is None else tuple(axis for axis, _ in _split(plan, weight.meets))
            if axes:
                key = (axes, weight.dtype)
                groups[key] = groups.get(key, 0) + weight.numel
        for (axes, dtype), numel in groups.items():
            every = len(axes) == len(plan.axes)
            for ranks in [plan.ranks] if every else [plan.axes[axis].size for axis in axes]:
                found.append(Sent(2 * (ranks - 1) * numel * dtype.itemsize // ranks, 1))
    return total(found)


def _buckets(weights: Sequence[Weight]) -> list[list[Weight]]:
    places = buckets([weight.nbytes for weight in weights])
    found: list[list[Weight]] = [[] for _ in range(max(places, default=-1) + 1)]
    for weight, place in reversed(list(zip(weights, places, strict=True))):
        found[place].append(weight)
    return found


def buckets(sizes: Sequence[int]) -> list[int]:
    """For parameters of these bytes the bucket in which each one's gradient is summed.

    Buckets run in the reverse order of the module, in which gradients become ready; their size depends on the model
    alone, so it is the same on every rank.
    """
    limit = max(SMALL_BUCKET_BYTES, min(BUCKET_BYTES, sum(sizes) // FEWEST_BUCKETS))
    places, bucket, filled = [], -1, limit
    for nbytes in reversed(sizes):
        if filled >= limit:
            bucket, filled = bucket + 1, 0
        places.append(bucket)
        filled += nbytes
    return places[::-1]
