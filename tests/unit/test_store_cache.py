"""Memory, disk and source give the same bytes in every order of use, under any budget, and damage is found."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data.cache import NEVER, Cache, Uses
from meshwright.data.spill import Spill

SIZE = 64


def packed(sample: int, size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), sample, dtype=torch.uint8)


def overwrite(spill: Spill, sample: int, at: int, byte: int) -> None:
    start, header = spill._places[sample]
    position = start + at % (len(header) + SIZE)
    before = os.pread(spill.file.fileno(), 1, position)
    os.pwrite(spill.file.fileno(), bytes([before[0] ^ byte]), position)


def belady_misses(order: list[int], room: int) -> int:
    """The fewest misses of any policy that may also keep nothing (Belady's MIN with bypass)."""
    held: set[int] = set()
    misses = 0
    for now, sample in enumerate(order):
        if sample not in held:
            misses += 1
            held.add(sample)

        def next_use(other: int, now: int = now) -> int:
            return next((t for t in range(now + 1, len(order)) if order[t] == other), NEVER)

        held = {other for other in held if next_use(other) < NEVER}
        while len(held) > room:
            held.remove(max(held, key=lambda other: (next_use(other), other)))
    return misses


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(0, 6),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 200), st.integers(1, 255)), max_size=6),
    st.integers(1, 50),
)
def test_a_cache_never_gives_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    room: int,
    with_disk: bool,
    damage: list[tuple[int, int, int]],
    horizon: int,
) -> None:
    """Random orders, budgets and flipped bytes on disk: the right bytes each time, within the budget."""
    spill = Spill(tmp_path_factory.getbasetemp()) if with_disk else None
    uses = Uses(lambda step: [order[step]], 0, len(order), horizon)
    cache = Cache(room * SIZE, uses, spill)
    for step, sample in enumerate(order):
        for _, at, byte in (flaw for flaw in damage if flaw[0] == step):
            if spill is not None and spill._places:
                overwrite(spill, sorted(spill._places)[at % len(spill._places)], at, byte)
        got = cache.get(sample, step, lambda sample=sample: packed(sample))
        assert torch.equal(got, packed(sample))
        assert cache.kept_bytes <= cache.budget_bytes
    stats = cache.stats
    assert stats.from_memory + stats.from_disk + stats.from_source == len(order)
    if with_disk:
        assert stats.from_source == len(set(order)) + stats.damaged
        assert stats.damaged <= len(damage)
    else:
        assert stats.spilled == 0
    cache.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 7))
def test_eviction_misses_as_seldom_as_any_policy_can(order: list[int], room: int) -> None:
    cache = Cache(room * SIZE, Uses(lambda step: [order[step]], 0, len(order), len(order)))
    for step, sample in enumerate(order):
        cache.get(sample, step, lambda sample=sample: packed(sample))
    assert cache.stats.from_source == belady_misses(order, room)


def test_every_flipped_byte_of_a_spilled_part_is_found(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    for at in range(SIZE + 28):
        assert spill.write(at, packed(at))
        overwrite(spill, at, at, 1)
        assert spill.read(at) is None
        assert at not in spill
    spill.close()


def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    spill.write(1, packed(1))
    spill.write(2, packed(2))
    os.ftruncate(spill.file.fileno(), spill.nbytes - 1)
    assert torch.equal(spill.read(1), packed(1))
    assert spill.read(2) is None
    spill.close()


def test_the_file_has_no_name_and_a_full_disk_only_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = Spill(tmp_path)
    cache = Cache(SIZE, Uses(lambda step: [step % 3], 0, None, 6), spill)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for step in range(9):
        assert torch.equal(cache.get(step % 3, step, lambda step=step: packed(step % 3)), packed(step % 3))
    assert cache.stats.spilled == cache.stats.from_disk == 0
    assert cache.stats.dropped > 0
    assert list(tmp_path.iterdir()) == []
    cache.close()


def test_threads_that_want_the_same_part_read_it_once() -> None:
    cache = Cache(100 * SIZE, Uses(lambda step: [0], 0, None, 4))
    together, second, reads = threading.Barrier(4), threading.Event(), list[int]()

    def load() -> torch.Tensor:
        reads.append(1)
        if len(reads) > 1:
            second.set()
        second.wait(0.2)  # room for a second read, which must not come
        return packed(0)

    def want() -> None:
        together.wait()
        cache.get(0, 0, load)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert cache.stats.from_memory == 3


def test_an_error_of_the_source_is_raised_and_tried_again_later() -> None:
    cache = Cache(SIZE, Uses(lambda step: [0], 0, None, 4))
    with pytest.raises(ZeroDivisionError):
        cache.get(0, 0, lambda: packed(1 // 0))
    assert torch.equal(cache.get(0, 1, lambda: packed(7)), packed(7))


def test_reserved_bytes_are_taken_from_what_is_kept() -> None:
    cache = Cache(4 * SIZE, Uses(lambda step: [step % 4], 0, None, 8))
    for step in range(4):
        cache.get(step, step, lambda step=step: packed(step))
    assert cache.kept_bytes == 4 * SIZE
    cache.reserve(2 * SIZE)
    assert cache.kept_bytes == 2 * SIZE
    cache.reserve(-2 * SIZE)
    assert [cache.get(s, 4 + s, lambda s=s: packed(s)).numel() for s in range(2)] == [SIZE] * 2
    assert cache.stats.from_memory == 2, "those that are used first have stayed"
    assert cache.peak_bytes <= 4 * SIZE
