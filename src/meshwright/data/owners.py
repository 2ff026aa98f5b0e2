"""Which rank keeps which sub-volume of which sample, and what a step must move: pure arithmetic, no communication.

    sample i ──first step that uses it──► sample group that reads and keeps it, for the whole run
    step t: position j of the batch ──plan──► ranks that need it; owner group ──► the pieces that travel

A sub-volume moves only where the sampler gives a sample to ranks that do not keep it. With equal layouts a rank gets
its whole box from the one rank of the owner group at its own spatial coordinates; with another layout for reading,
the boxes of the owner group are cut with the box that is wanted, and each voxel comes from its one owner. Every rank
computes the same, so sends and receives pair up without any negotiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshwright.plan.geometry import Interval, chunk
from meshwright.plan.plan import Plan, interval

Box = tuple[Interval, Interval, Interval]
Shape = tuple[int, int, int]
BoxesOf = Callable[[int, int], Sequence[Box]]  # (position in the batch, rank) → what the rank needs of that sample


def box_of(spans: Sequence[slice]) -> Box:
    """Slices of D, H, W as a box."""
    d, h, w = (Interval(span.start, span.stop) for span in spans)
    return d, h, w


def sizes(box: Box) -> Shape:
    """The edges d, h, w of a box."""
    d, h, w = (span.size for span in box)
    return d, h, w


def voxels(box: Box) -> int:
    return math.prod(sizes(box))


def spans_in(box: Box, outer: Box) -> tuple[slice, slice, slice]:
    """The slices of `box` within a tensor that holds `outer`."""
    d, h, w = (slice(a.lo - b.lo, a.hi - b.lo) for a, b in zip(box, outer, strict=True))
    return d, h, w


def meet(a: Box, b: Box) -> Box:
    """The part common to both, empty in every dim if it is in one."""
    d, h, w = (x.meet(y) for x, y in zip(a, b, strict=True))
    return d, h, w


def intersections(sources: Sequence[Box], targets: Sequence[Box]) -> tuple[tuple[int, int, Box], ...]:
    """(source, target, box) of every non-empty piece that `targets` want of what `sources` hold, in a fixed order."""
    found = ((s, t, meet(source, target)) for t, target in enumerate(targets) for s, source in enumerate(sources))
    return tuple((s, t, box) for s, t, box in found if voxels(box))


def _sample_axis(plan: Plan) -> int | None:
    return next((index for index, axis in enumerate(plan.axes) if axis.role == "sample"), None)


@lru_cache(maxsize=1024)
def groups(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """The ranks of each sample coordinate, all in the order of their spatial coordinates."""
    axis = _sample_axis(plan)
    if axis is None:
        return (tuple(range(plan.ranks)),)
    found: list[list[int]] = [[] for _ in range(plan.axes[axis].size)]
    for rank in range(plan.ranks):
        found[plan.coordinates(rank)[axis]].append(rank)
    return tuple(tuple(ranks) for ranks in found)


@lru_cache(maxsize=65536)
def place(plan: Plan, rank: int) -> tuple[int, int]:
    """(sample coordinate, index among the ranks of that coordinate) of a rank."""
    axis = _sample_axis(plan)
    group = 0 if axis is None else plan.coordinates(rank)[axis]
    return group, groups(plan)[group].index(rank)


@lru_cache(maxsize=65536)
def cell(plan: Plan, shape: Shape, rank: int, halo: Shape = (0, 0, 0)) -> Box:
    """The box of a sample of `shape` that `rank` works on, wider by `halo` on both sides where the sample goes on."""
    core = box_of(interval((1, 1, *shape), plan, rank)[2:])
    d, h, w = (
        Interval(max(0, span.lo - wide), min(size, span.hi + wide)) if span.size else span
        for span, size, wide in zip(core, shape, halo, strict=True)
    )
    return d, h, w


@dataclass(frozen=True)
class Piece:
    """The `box` of `sample`, number `position` of the step's batch, which rank `target` needs and `source` keeps.

    It belongs to number `part` of the boxes that the target needs of the sample; there is one unless samples are
    augmented.
    """

    position: int
    sample: int
    source: int
    target: int
    box: Box
    part: int = 0


@dataclass(frozen=True)
class Moves:
    """What one rank does in one step. A piece from itself is in `arriving` and not in `leaving`."""

    step: int
    indices: tuple[int, ...]
    positions: range  # of the batch that this rank needs
    arriving: tuple[Piece, ...]
    leaving: tuple[Piece, ...]

    def samples_served(self, rank: int) -> tuple[int, ...]:
        """The samples that `rank` must have at hand, in the order of the batch."""
        own = [piece for piece in self.arriving if piece.source == rank]
        ordered = sorted((*own, *self.leaving), key=lambda piece: piece.position)
        return tuple(dict.fromkeys(piece.sample for piece in ordered))


class Owners:
    """The owner map as a fold over the steps in their order; two of them that saw the same steps are equal.

    `plan` says which rank needs what, `reading` (default: the same) which rank reads and keeps what; both over the
    same ranks. `halo` widens what is needed. Where a batch does not divide evenly, groups keep unevenly many samples.
    With `views`, what a rank needs of a sample is said step by step (`moves(…, boxes_of)`), and may be any boxes.
    """

    def __init__(
        self,
        shape_of: Callable[[int], Shape],
        plan: Plan,
        reading: Plan | None = None,
        halo: Shape = (0, 0, 0),
        views: bool = False,
    ) -> None:
        self.plan, self.reading, self.halo = plan, reading or plan, halo
        self._shape_of = shape_of
        self._same = self.reading == plan and not views
        self._owner: dict[int, int] = {}

    @property
    def moves_nothing(self) -> bool:
        """Whether no step can ever move anything: a single rank, or one layout and a single sample group."""
        return self.plan.ranks == 1 or (self._same and len(groups(self.plan)) == 1)

    @property
    def circles(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that may exchange with each other, each rank in one circle: those of equal spatial coordinates."""
        if self._same:
            return tuple(tuple(sorted(ranks)) for ranks in zip(*groups(self.plan), strict=True))
        return (tuple(range(self.plan.ranks)),)

    def owner(self, sample: int) -> int | None:
        """The sample coordinate (of `reading`) whose ranks keep a sample; None before its first use."""
        return self._owner.get(sample)

    def held(self, sample: int, rank: int) -> Box:
        """The box of a sample that `rank` keeps if its group owns the sample."""
        return cell(self.reading, self._shape_of(sample), rank, self.halo if self._same else (0, 0, 0))

    def wanted(self, sample: int, rank: int) -> Box:
        """The box of a sample that `rank` works on."""
        return cell(self.plan, self._shape_of(sample), rank, self.halo)

    def note(self, indices: Sequence[int]) -> None:
        """The next step of the order: samples that are new to the run belong to the group that reads them now."""
        parts = len(groups(self.reading))
        for coordinate in range(parts):
            span = chunk(len(indices), parts, coordinate)
            for sample in indices[span.lo : span.hi]:
                self._owner.setdefault(sample, coordinate)

    def moves(self, step: int, indices: Sequence[int], rank: int, boxes_of: BoxesOf | None = None) -> Moves:
        """What `rank` gets and gives in a step whose samples have been noted."""
        parts = len(groups(self.plan))
        mine, leaving = chunk(len(indices), parts, place(self.plan, rank)[0]), []
        arriving = [piece for j in range(mine.lo, mine.hi) for piece in self._pieces(j, indices[j], rank, boxes_of)]
        for coordinate in range(parts):
            span = chunk(len(indices), parts, coordinate)
            for j in range(span.lo, span.hi):
                leaving += self._given(j, indices[j], coordinate, rank, boxes_of)
        return Moves(step, tuple(indices), range(mine.lo, mine.hi), tuple(arriving), tuple(leaving))

    def _pieces(self, position: int, sample: int, target: int, boxes_of: BoxesOf | None) -> list[Piece]:
        """Where `target` gets its boxes from."""
        holders = groups(self.reading)[self._owner[sample]]
        if self._same:
            want = self.wanted(sample, target)
            return [Piece(position, sample, holders[place(self.plan, target)[1]], target, want)]
        wanted = [self.wanted(sample, target)] if boxes_of is None else boxes_of(position, target)
        held = [self.held(sample, rank) for rank in holders]
        found = [Piece(position, sample, holders[s], target, box, k) for s, k, box in intersections(held, wanted)]
        if not voxels(wanted[0]):  # nothing of the volume, yet the fields that are no volume come with the first box
            found.insert(0, Piece(position, sample, holders[0], target, wanted[0]))
        return found

    def _given(self, position: int, sample: int, coordinate: int, source: int, boxes_of: BoxesOf | None) -> list[Piece]:
        """What `source` gives to the ranks of a sample coordinate other than itself."""
        owner, index = place(self.reading, source)
        if owner != self._owner[sample]:
            return []
        targets = groups(self.plan)[coordinate]
        near = [targets[index]] if self._same else targets
        others = (target for target in near if target != source)
        pieces = (piece for target in others for piece in self._pieces(position, sample, target, boxes_of))
        return [piece for piece in pieces if piece.source == source]
