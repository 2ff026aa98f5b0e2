"""Laws of the owner map: every voxel that is needed arrives once, from who keeps it, and nothing else moves."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data.owners import (
    Box,
    Moves,
    Owners,
    Shape,
    box_of,
    cell,
    groups,
    intersections,
    place,
    sizes,
    spans_in,
    voxels,
)
from meshwright.plan.geometry import Interval
from meshwright.plan.plan import Axis, Plan, interval

ROLES = {"data": "sample", "depth": "depth", "height": "height", "width": "width"}


def plans(ranks: int) -> list[Plan]:
    """Every plan of so many ranks, in every order of its axes."""
    found = []
    for factors in itertools.product(range(1, ranks + 1), repeat=4):
        if np.prod(factors) == ranks:
            axes = [Axis(n, f, ROLES[n]) for n, f in zip(ROLES, factors, strict=True) if f > 1]
            found += [Plan(order) for order in itertools.permutations(axes or [Axis("data", 1, "sample")])]
    return found


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Shape], list[list[int]], Plan, Plan | None, Shape]:
    """Shapes of samples, batches of equally large ones, the plan, how it is read, and a halo."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    plan = draw(st.sampled_from(plans(ranks)))
    reading = draw(st.none() | st.sampled_from(plans(ranks)))
    edge = st.integers(1, 7)
    kinds = draw(st.lists(st.tuples(edge, edge, edge), min_size=1, max_size=3))
    shapes = [draw(st.sampled_from(kinds)) for _ in range(draw(st.integers(1, 6)))]
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        one = draw(st.sampled_from(shapes))
        same = [i for i, shape in enumerate(shapes) if shape == one]
        steps.append(draw(st.lists(st.sampled_from(same), min_size=1, max_size=5)))
    halo = draw(st.tuples(*[st.integers(0, 2)] * 3))
    return shapes, steps, plan, reading, halo


def followed(
    run: tuple[list[Shape], list[list[int]], Plan, Plan | None, Shape], rank: int
) -> tuple[Owners, list[Moves]]:
    shapes, steps, plan, reading, halo = run
    owners, found = Owners(shapes.__getitem__, plan, reading, halo), []
    for number, indices in enumerate(steps):
        owners.note(indices)
        found.append(owners.moves(number, indices, rank))
    return owners, found


def rows(plan: Plan, rank: int, size: int) -> slice:
    """The positions of a batch of `size` that a rank works on."""
    return interval((size, 1, 1, 1, 1), plan, rank)[0]


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_voxel_arrives_once_from_a_rank_that_keeps_it(run: tuple) -> None:
    _, steps, plan, _, _ = run
    for rank in range(plan.ranks):
        owners, moves = followed(run, rank)
        for number, step in enumerate(moves):
            for j in step.positions:
                sample = steps[number][j]
                want = owners.wanted(sample, rank)
                count = np.zeros(sizes(want), int)
                pieces = [piece for piece in step.arriving if piece.position == j]
                for piece in pieces:
                    held = owners.held(sample, piece.source)
                    assert place(owners.reading, piece.source)[0] == owners.owner(sample)
                    if voxels(piece.box):
                        assert all(a.lo <= b.lo and b.hi <= a.hi for a, b in zip(held, piece.box, strict=True))
                        count[spans_in(piece.box, want)] += 1
                assert (count == 1).all()
                assert pieces, "the fields that are no volume come even to a rank without a voxel"
            assert list(step.positions) == list(range(len(steps[number])))[rows(plan, rank, len(steps[number]))]


@settings(max_examples=100, deadline=None)
@given(runs())
def test_what_one_rank_gives_is_what_another_gets(run: tuple) -> None:
    plan = run[2]
    seen = [followed(run, rank)[1] for rank in range(plan.ranks)]
    for number in range(len(run[1])):
        got = {piece for moves in seen for piece in moves[number].arriving if piece.source != piece.target}
        given_ = [piece for moves in seen for piece in moves[number].leaving]
        assert set(given_) == got
        assert len(given_) == len(got)
        assert all(piece.target == rank for rank, moves in enumerate(seen) for piece in moves[number].arriving)


@settings(max_examples=150, deadline=None)
@given(runs())
def test_nothing_moves_that_is_there(run: tuple) -> None:
    """With one layout a box moves only to a rank whose group does not own the sample, whole, within its circle."""
    shapes, steps, plan, _, halo = run
    run = (shapes, steps, plan, None, halo)
    for rank in range(plan.ranks):
        owners, moves = followed(run, rank)
        circle = next(circle for circle in owners.circles if rank in circle)
        for number, step in enumerate(moves):
            group = place(plan, rank)[0]
            for j in step.positions:
                sample = steps[number][j]
                from_others = [p for p in step.arriving if p.position == j and p.source != rank]
                assert len(from_others) == (owners.owner(sample) != group)
                assert all(p.source in circle and p.box == owners.wanted(sample, rank) for p in from_others)
            if len(groups(plan)) == 1:
                assert owners.moves_nothing
                assert not step.leaving


@settings(max_examples=100, deadline=None)
@given(runs())
def test_a_voxel_stays_where_source_and_target_are_one_rank(run: tuple) -> None:
    """With another layout for reading, what a rank wants and keeps itself does not come from elsewhere."""
    shapes, steps, plan, reading, _ = run
    for rank in range(plan.ranks):
        owners, moves = followed((shapes, steps, plan, reading, (0, 0, 0)), rank)
        for step in moves:
            for piece in step.arriving:
                if piece.source != rank and place(owners.reading, rank)[0] == owners.owner(piece.sample):
                    held = owners.held(piece.sample, rank)
                    assert not intersections([held], [piece.box])


@settings(max_examples=100, deadline=None)
@given(runs(), st.integers(0, 99))
def test_any_boxes_come_whole_and_once(run: tuple, seed: int) -> None:
    """Augmented samples: what a rank needs of a sample is any number of boxes, empty ones among them."""
    shapes, steps, plan, reading, _ = run
    everyone = [Owners(shapes.__getitem__, plan, reading, views=True) for _ in range(plan.ranks)]
    for number, indices in enumerate(steps):

        def boxes_of(position: int, rank: int, number: int = number, indices: list[int] = indices) -> list[Box]:
            draw = np.random.default_rng((seed, number, position, rank))
            found = []
            for _ in range(draw.integers(1, 4)):
                edges = [sorted(draw.integers(0, size + 1, 2).tolist()) for size in shapes[indices[position]]]
                found.append(box_of([slice(*edge) for edge in edges]))
            return found

        seen: list[Moves] = []
        for rank, owners in enumerate(everyone):
            owners.note(indices)
            seen.append(owners.moves(number, indices, rank, boxes_of))
            for j in seen[-1].positions:
                for k, want in enumerate(boxes_of(j, rank)):
                    count = np.zeros(sizes(want), int)
                    for piece in seen[-1].arriving:
                        if (piece.position, piece.part) == (j, k) and voxels(piece.box):
                            held = owners.held(indices[j], piece.source)
                            assert intersections([held], [piece.box]) == ((0, 0, piece.box),)
                            count[spans_in(piece.box, want)] += 1
                    assert (count == 1).all()
                assert any(piece.position == j for piece in seen[-1].arriving)
        got = Counter(p for moves in seen for p in moves.arriving if p.source != p.target)
        assert Counter(p for moves in seen for p in moves.leaving) == got


def test_the_owner_is_the_group_that_reads_first() -> None:
    owners = Owners(lambda _: (4, 4, 4), Plan.uniform(data=2))
    for indices in ([0, 1], [2, 3], [3, 0], [1, 2], [4, 4]):
        owners.note(indices)
    assert [owners.owner(sample) for sample in range(6)] == [0, 1, 0, 1, 0, None]
    moves = owners.moves(2, [3, 0], 0)
    assert [(p.sample, p.source, p.target) for p in moves.arriving] == [(3, 1, 0)]
    assert [(p.sample, p.source, p.target) for p in moves.leaving] == [(0, 0, 1)]


def test_sample_parallel_reading_of_a_split_sample() -> None:
    """The first layer's layout n2, the others' d2: each rank reads whole samples and gives half of each away."""
    owners = Owners(lambda _: (6, 2, 2), Plan.uniform(depth=2), Plan.uniform(data=2))
    owners.note([0, 1])
    moves = owners.moves(0, [0, 1], 1)
    half = (Interval(3, 6), Interval(0, 2), Interval(0, 2))
    assert [(p.sample, p.source, p.box) for p in moves.arriving] == [(0, 0, half), (1, 1, half)]
    assert [(p.sample, p.target, p.box[0]) for p in moves.leaving] == [(1, 0, Interval(0, 3))]


@pytest.mark.parametrize("halo", [(0, 0, 0), (1, 0, 2)])
def test_cells_with_halo_end_where_the_sample_ends(halo: Shape) -> None:
    plan = Plan.uniform(depth=2, width=3)
    for rank in range(6):
        d, h, w = cell(plan, (5, 4, 7), rank, halo)
        assert 0 <= d.lo <= d.hi <= 5
        assert h == Interval(0, 4)
        assert 0 <= w.lo <= w.hi <= 7
    assert cell(plan, (5, 4, 7), 4, (1, 0, 2)) == box_of((slice(2, 5), slice(0, 4), slice(1, 7)))
