"""Freed memory stays with the process where it may; each in a process of its own, for it cannot be undone."""

from __future__ import annotations

import os
import resource
import sys

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.cluster import pages
from meshwright.errors import RankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")


def decided_without_peak() -> bool:
    """What is decided where the kernel counts no peak."""
    pages.peak_bytes = lambda: 0
    return decided({})


def test_an_unknown_need_has_no_room() -> None:
    """Nothing is kept on a guess."""
    assert mw.launch(decided_without_peak, ranks=1) == [False]


def decided(settings: dict[str, str], limited: bool = False, available_bytes: int | None = None) -> bool:
    """What is decided under variables, a limit of the address space, or with so much memory available."""
    for name in (pages.VARIABLE, *pages._OWN):
        os.environ.pop(name, None)
    os.environ.update(settings)
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (2**45, resource.RLIM_INFINITY))
    if available_bytes is not None:
        pages.available_bytes = lambda: available_bytes
    return pages.keep_pages()


@pytest.mark.parametrize(
    ("settings", "rest", "kept"),
    [
        ({}, (False, 2**50), True),
        ({}, (False, 2**20), False),
        ({}, (True, 2**50), False),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, (False, 2**50), False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=4"}, (False, 2**50), False),
        ({pages.VARIABLE: "return"}, (False, 2**50), False),
        ({pages.VARIABLE: "keep", "MALLOC_TOP_PAD_": "0"}, (True, 2**20), True),
    ],
)
def test_who_decides(settings: dict[str, str], rest: tuple[bool, int], kept: bool) -> None:
    """The variable, else glibc's own, else the room there is."""
    assert mw.launch(decided, ranks=1, args=(settings, *rest)) == [kept]


def steps() -> list[int]:
    """Page faults of six steps with parts of 40 MB, which glibc maps and unmaps whatever it has learnt (over 32 MB)."""
    plan = mw.Plan.uniform(depth=2)
    model = mw.parallelize(nn.Sequential(nn.SiLU(), nn.PReLU(), nn.SiLU()), plan)
    x = mw.shard(torch.ones(1, 1, 160, 256, 512), plan)
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model.zero_grad()
        model(x).square().mean().backward()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


def test_steps_take_few_fresh_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the process knows its need."""
    monkeypatch.setenv(pages.VARIABLE, "keep")
    kept = [sum(faults[3:]) for faults in mw.launch(steps, ranks=2)]
    monkeypatch.setenv(pages.VARIABLE, "return")
    returned = [sum(faults[3:]) for faults in mw.launch(steps, ranks=2)]
    assert max(kept) * 3 < min(returned), (kept, returned)


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step."""
    monkeypatch.setenv(pages.VARIABLE, "always")
    with pytest.raises(RankError, match=r"MESHWRIGHT_PAGES='always': set it to auto, keep or return"):
        mw.launch(steps, ranks=2)
