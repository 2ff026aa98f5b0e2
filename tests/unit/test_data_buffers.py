"""buffers.py: pages that are used again are never those of a tensor that somebody still holds, and never too many."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import buffers
from meshwright.data.buffers import HUGE_BYTES, SMALLEST_BYTES, Recycled, buffer, empty
from meshwright.data.packing import Packing
from meshwright.data.source import IMAGE, LABEL, Field

SIZES = (100, SMALLEST_BYTES, SMALLEST_BYTES + 1, 3 * SMALLEST_BYTES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(SIZES)), max_size=40), st.integers(0, 8))
def test_no_two_tensors_share_memory_and_what_is_unused_stays_small(events: list[tuple[int, int]], room: int) -> None:
    """Six holders let go of what they have and ask anew; each still finds what it wrote, through a view, too."""
    limit = room * SMALLEST_BYTES
    pages = Recycled(lambda nbytes: pages.free_bytes + nbytes <= limit)
    held: dict[int, tuple[int, torch.Tensor]] = {}
    for number, (holder, size) in enumerate(events):
        held.pop(holder, None)
        held[holder] = number, pages.buffer(size).fill_(number)[3:]
        assert held[holder][1].numel() == size - 3
        assert all(bool((tensor == wrote).all()) for wrote, tensor in held.values())
        assert pages.free_bytes <= limit
        assert len(pages._free) <= buffers.MOST_FREE
    held.clear()
    pages.drop()
    assert pages.free_bytes == 0


def test_pages_come_back_when_the_last_view_is_gone() -> None:
    pages = Recycled(lambda nbytes: True)
    whole = pages.buffer(SMALLEST_BYTES)
    view, where = whole.view(torch.float32)[2:].numpy(), whole.data_ptr()
    del whole
    assert pages.free_bytes == 0
    del view
    assert pages.free_bytes == SMALLEST_BYTES
    assert pages.buffer(SMALLEST_BYTES).data_ptr() == where
    assert pages.buffer(2 * SMALLEST_BYTES).numel() == 2 * SMALLEST_BYTES  # of another size
    held = [pages.buffer(SMALLEST_BYTES) for _ in range(9)]
    del held
    assert len(pages._free) == buffers.MOST_FREE


def test_a_tensor_that_dies_inside_of_a_call_blocks_nobody() -> None:
    """Its thread holds the lock of the pages already: they go back to the system."""
    pages = Recycled(lambda nbytes: True)
    tensor = [pages.buffer(SMALLEST_BYTES)]
    with pages._lock:
        tensor.clear()
    assert pages.free_bytes == 0


def test_many_threads_use_the_same_pages() -> None:
    pages, wrong = Recycled(lambda nbytes: True), list[int]()

    def work(mark: int) -> None:
        for _ in range(200):
            tensor = pages.buffer(SMALLEST_BYTES).fill_(mark)
            if not bool((tensor == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("nbytes", [SMALLEST_BYTES - 1, SMALLEST_BYTES, HUGE_BYTES, HUGE_BYTES + 1, 2 * HUGE_BYTES + 7])
def test_a_buffer_has_the_bytes_that_were_asked_for(nbytes: int) -> None:
    found = buffer(nbytes).fill_(7)
    assert (found.numel(), int(found.sum(dtype=torch.int64))) == (nbytes, 7 * nbytes)
    assert empty((3, nbytes), torch.int16).shape == (3, nbytes)


def test_fields_that_lie_packed_are_known_and_others_are_not() -> None:
    box = (3, 5, 7)
    packing = Packing({"label": LABEL, "image": IMAGE, "target": Field("K", (3,), torch.float64)})
    packed, room = packing.room(box)
    assert packing.is_packed(packed, room, box)
    assert not packing.is_packed(packed, room | {"image": room["image"].clone()}, box)
    assert not packing.is_packed(packed, {name: room[name] for name in ("image", "label")}, box)
    assert not packing.is_packed(packed, room, (3, 5, 8))
    assert not packing.is_packed(packed, room | {"label": room["label"].view(torch.int8)}, box)
    assert not packing.is_packed(packed.clone(), room, box)
