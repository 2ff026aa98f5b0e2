"""Laws of the interval arithmetic: chunks partition a range as torch does, transfers cover what is wanted once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from meshwright.plan.geometry import Interval, chunk, chunks, transfers

SIZES = st.integers(0, 200)
PARTS = st.integers(1, 12)


@st.composite
def intervals(draw: st.DrawFn, size: int) -> Interval:
    lo = draw(st.integers(0, size))
    return Interval(lo, draw(st.integers(lo, size)))


@given(SIZES, PARTS)
def test_chunks_partition_the_range(size: int, parts: int) -> None:
    spans = chunks(size, parts)
    assert len(spans) == parts
    assert [position for span in spans for position in range(*span)] == list(range(size))


@given(st.integers(1, 200), PARTS)
def test_chunks_equal_torch_chunk(size: int, parts: int) -> None:
    sizes = [piece.numel() for piece in torch.arange(size).chunk(parts)]
    expected = sizes + [0] * (parts - len(sizes))  # torch returns fewer pieces; here the rest are empty
    assert [span.size for span in chunks(size, parts)] == expected


@given(SIZES, PARTS)
def test_chunks_equal_those_of_dtensor(size: int, parts: int) -> None:
    for index in range(parts):
        local_size, offset = Shard(0).local_shard_size_and_offset(size, parts, index)
        span = chunk(size, parts, index)
        assert span.size == local_size
        if local_size:
            assert span.lo == offset


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 60), st.integers(1, 12))
def test_meet_is_the_common_part(a: int, a_size: int, b: int, b_size: int) -> None:
    first, second = Interval(a, a + a_size), Interval(b, b + b_size)
    common = first.meet(second)
    assert set(range(*common)) == set(range(*first)) & set(range(*second))
    assert common.size >= 0


@settings(max_examples=200)
@given(st.data(), st.integers(0, 40), st.integers(1, 8))
def test_transfers_bring_every_wanted_position_exactly_once(data: st.DataObject, size: int, parts: int) -> None:
    owned = chunks(size, parts)
    wanted = tuple(data.draw(intervals(size)) for _ in range(parts))
    moves = transfers(owned, wanted)
    for target, want in enumerate(wanted):
        arrived = [p for move in moves if move.target == target for p in range(*move.span)]
        assert arrived == list(range(*want))  # once each, and in order: the pieces can be laid side by side
    for move in moves:
        assert move.span.size > 0
        assert owned[move.source].meet(move.span) == move.span


@given(st.data(), st.integers(0, 40), st.integers(1, 8))
def test_transfers_of_owned_intervals_stay_at_home(data: st.DataObject, size: int, parts: int) -> None:
    owned = chunks(size, parts)
    assert all(move.source == move.target for move in transfers(owned, owned))


def test_chunk_by_hand() -> None:
    assert [tuple(span) for span in chunks(10, 4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [tuple(span) for span in chunks(5, 4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [span.size for span in chunks(2, 4)] == [1, 1, 0, 0]


def test_transfer_of_a_halo_by_hand() -> None:
    owned = chunks(6, 3)
    wanted = (Interval(0, 3), Interval(1, 5), Interval(3, 6))
    moves = [(m.source, m.target, tuple(m.span)) for m in transfers(owned, wanted) if m.source != m.target]
    assert moves == [(1, 0, (2, 3)), (0, 1, (1, 2)), (2, 1, (4, 5)), (1, 2, (3, 4))]
