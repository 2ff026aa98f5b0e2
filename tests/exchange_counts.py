"""The traffic of CosmoFlow counted twice more, without any of the library's arithmetic.

`even` is the closed form for shards of equal size: kernel 3 with padding 1 reads one plane beyond each cut at stride
1, and at stride 2 the plane before it alone. `counted` takes explicit sets of positions, for shards of any size.
`by_voxel` carries explicit sets of voxels from rank to rank, to show that what is sent suffices.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Triple = tuple[int, int, int]


class Count(NamedTuple):
    """Bytes and messages that one rank sends forward and backward."""

    forward: int = 0
    forward_messages: int = 0
    backward: int = 0
    backward_messages: int = 0

    def plus(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Step:
    """A convolution or pooling on a volume of `space` (input); windows are equal in all dims."""

    name: str
    kind: str  # "convolution", "avg_pool"
    channels: int
    space: tuple[int, ...]
    stride: int = 1
    kernel: int = 3
    padding: int = 1
    dilation: int = 1
    trains_input: bool = True
    itemsize: int = 4

    def order(self) -> list[int]:
        """A convolution exchanges the last dim first, a pooling the first."""
        dims = list(range(len(self.space)))
        return dims[::-1] if self.kind == "convolution" else dims

    def outputs(self, dim: int) -> int:
        room = self.space[dim] + 2 * self.padding - self.dilation * (self.kernel - 1) - 1
        return room // self.stride + 1


def cosmoflow(edge: int, width: int, pools: int, in_channels: int = 4) -> list[Step]:
    """The published network: seven convolutions, the fourth of stride 2, the first `pools` of them pooled."""
    steps, channels, place = [], in_channels, 0
    for index, multiple in enumerate((1, 2, 4, 8, 16, 16, 16)):
        stride = 2 if index == 3 else 1
        name = f"features.{place}"
        steps.append(Step(name, "convolution", channels, (edge,) * 3, stride, trains_input=index > 0))
        channels, edge, place = width * multiple, edge // stride, place + 2  # a leaky ReLU follows
        if index < pools:
            steps.append(Step(f"features.{place}", "avg_pool", channels, (edge,) * 3, 2))
            edge, place = edge // 2, place + 1
    return steps


def places(parts: Sequence[int]) -> list[tuple[int, ...]]:
    """The position of every rank, the last dim fastest."""
    return list(itertools.product(*(range(p) for p in parts)))


def is_even(step: Step, parts: Sequence[int]) -> bool:
    """Whether the closed form holds: equal shards, and with stride 2 their outputs are equal too."""
    return all(size % (p * step.stride) == 0 or p == 1 for size, p in zip(step.space, parts, strict=True))


def even(step: Step, parts: Sequence[int], place: Sequence[int]) -> Count:
    """The closed form: faces of the part, each as wide as the part with the planes that earlier dims brought."""
    out = Count()
    extent = [size // p for size, p in zip(step.space, parts, strict=True)]
    if step.kind == "avg_pool":  # dims that are whole are pooled before anything is sent
        extent = [
            step.outputs(dim) if p == 1 else size for dim, (size, p) in enumerate(zip(extent, parts, strict=True))
        ]
    for dim in step.order():
        before, after = int(place[dim] > 0), int(place[dim] < parts[dim] - 1)
        sends, receives = (before + after, before + after) if step.stride == 1 else (after, before)
        face = math.prod(extent) // extent[dim] * step.channels * step.itemsize
        back = receives if step.trains_input else 0
        out = out.plus(Count(sends * face, sends, back * face, back))
        extent[dim] += receives
    return out


def switch(channels: int, parts: Sequence[int], place: Sequence[int], itemsize: int = 4) -> Count:
    """Where space ends, at 2 positions a dim: every rank hears every other one that has something, axis by axis."""
    out = Count()
    shape = [min(2, (i + 1) * -(-2 // p)) - min(2, i * -(-2 // p)) for i, p in zip(place, parts, strict=True)]
    for dim, p in enumerate(parts):
        nbytes = channels * math.prod(shape) * itemsize
        out = out.plus(Count((p - 1) * nbytes, p - 1 if nbytes else 0))
        shape[dim] = 2
    return out


def _owner(size: int, parts: int) -> list[int]:
    step = -(-size // parts)
    return [position // step for position in range(size)]


def _reads(step: Step, dim: int, parts: int) -> list[set[int]]:
    """For each rank along a dim the positions from the first to the last tap of its outputs."""
    taps: list[list[int]] = [[] for _ in range(parts)]
    for output, rank in enumerate(_owner(step.outputs(dim), parts)):
        taps[rank] += [output * step.stride - step.padding + step.dilation * j for j in range(step.kernel)]
    inside = set(range(step.space[dim]))
    return [inside & set(range(min(places), max(places) + 1)) if places else set() for places in taps]


def counted(step: Step, parts: Sequence[int], batch: int = 1) -> list[Count]:
    """For every rank, position by position: who owns what another one's outputs read."""
    owners = [_owner(size, p) for size, p in zip(step.space, parts, strict=True)]
    reads = [_reads(step, dim, p) for dim, p in enumerate(parts)]
    pieces = []  # per dim: (source, target) -> planes
    for dim, lines in enumerate(reads):
        taken = ((owners[dim][position], target) for target, line in enumerate(lines) for position in line)
        pieces.append(Counter(pair for pair in taken if pair[0] != pair[1]))
    sent = [[[n for (s, _), n in c.items() if s == i] for i in range(p)] for c, p in zip(pieces, parts, strict=True)]
    got = [[[n for (_, t), n in c.items() if t == i] for i in range(p)] for c, p in zip(pieces, parts, strict=True)]
    results = []
    for place in places(parts):
        extent, pooled = [owners[dim].count(place[dim]) for dim in range(len(parts))], set()
        if step.kind == "avg_pool":  # dims that need no other rank are pooled before anything is sent, unless they grow
            for dim, p in enumerate(parts):
                if not pieces[dim] and step.outputs(dim) <= step.space[dim]:
                    extent[dim] = _owner(step.outputs(dim), p).count(place[dim])
                    pooled.add(dim)
        out = Count()
        for dim in step.order():
            if parts[dim] == 1:  # nothing is cut there, nor cut off
                continue
            others = math.prod(extent[:dim] + extent[dim + 1 :]) * batch * step.channels * step.itemsize
            away, here = (list(side[dim][place[dim]]) if others else [] for side in (sent, got))
            if not step.trains_input:
                here = []
            out = out.plus(Count(sum(away) * others, len(away), sum(here) * others, len(here)))
            if dim not in pooled:
                extent[dim] = len(reads[dim][place[dim]])
        results.append(out)
    return results


def by_voxel(step: Step, parts: Sequence[int]) -> Iterator[tuple[set[Triple], set[Triple], int]]:
    """For every rank of a small volume: the voxels that its outputs read, those that it ends up with, those sent."""
    owners = [_owner(size, p) for size, p in zip(step.space, parts, strict=True)]
    reads = [_reads(step, dim, p) for dim, p in enumerate(parts)]
    held: dict[tuple[int, ...], set[Triple]] = {place: set() for place in places(parts)}
    for voxel in itertools.product(*(range(size) for size in step.space)):
        held[tuple(owners[dim][at] for dim, at in enumerate(voxel))].add(voxel)
    sent: Counter[tuple[int, ...]] = Counter()
    for dim in step.order():
        after = {}
        for place, own in held.items():
            wanted = reads[dim][place[dim]]
            after[place] = {voxel for voxel in own if voxel[dim] in wanted}
            for other in range(parts[dim]):
                if other != place[dim]:
                    source = (*place[:dim], other, *place[dim + 1 :])
                    piece = {v for v in held[source] if v[dim] in wanted and owners[dim][v[dim]] == other}
                    assert not piece & after[place], "a voxel arrived twice"
                    after[place] |= piece
                    sent[source] += len(piece)
        held = after
    for place in places(parts):
        box = itertools.product(*(reads[dim][place[dim]] for dim in range(3)))
        yield set(box), held[place], sent[place]
