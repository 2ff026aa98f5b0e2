"""A store whose neighbour dies, hangs, closes early or cannot read: one message, in time, and no thread left."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

import meshwright as mw
from meshwright.cluster.launch import launch
from meshwright.data import sampler
from meshwright.data.store import Store
from meshwright.errors import ConfigError, DataError, RankError
from meshwright.parallel.transport import VARIABLE
from store_jobs import MANY, Numbers, caught, caught_split, serve, train_until

END_S = 20.0
SHAPES = ((6, 5, 4),) * 8


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The first launch of a process imports torch in the fork server; the time limits are about faults."""
    launch(serve, 2, ("n2", None, SHAPES, 2))


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < END_S
    assert [child for child in psutil.Process().children(recursive=True) if child.ppid() != os.getpid()] == []


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("meshwright-read", "meshwright-moves")]


@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_a_rank_that_dies_while_exchanging(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, transport)
    with pytest.raises(RankError) as error:
        launch(train_until, 2, (7, "kill", "swap"), timeout_s=60)
    assert error.value.rank == 1
    text = str(error.value)
    assert text.startswith("rank 1 of 2 was killed by SIGKILL")
    assert text.count("Traceback") == 0


@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_a_rank_that_falls_silent_while_exchanging(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's own limit of 2 s, not that of the job, ends the wait."""
    monkeypatch.setenv(VARIABLE, transport)
    with pytest.raises(RankError) as error:
        launch(train_until, 2, (7, "stop", "swap", None, 2.0), timeout_s=600)
    text = str(error.value)
    assert error.value.rank == 1
    assert "stopped (SIGSTOP)" in text
    assert "rank 0: waited for another rank at" in text
    assert re.search(r"ExchangeError: rank 0: step \d+, sample \d+ \(case_0\d\): rank 1 does not answer", text)


@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_all_ranks_may_close_early(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, transport)
    begin_s = time.monotonic()
    assert launch(train_until, 2, (9, "close", ""), timeout_s=60) == [9, 9]
    assert time.monotonic() - begin_s < 55  # of the 60 s that a rank waits for one that is gone


def test_an_error_of_the_job_is_the_one_that_is_told() -> None:
    with pytest.raises(RankError) as error:
        launch(train_until, 2, (9, "raise", ""), timeout_s=60)
    assert error.value.rank == 1
    assert str(error.value).startswith("rank 1 of 2 failed: ValueError: enough")


def test_others_hear_of_a_rank_that_closed() -> None:
    """Rank 1 leaves before step 9 is computed; rank 0 learns it where it next needs rank 1, not by waiting."""
    zero, one = launch(caught, 2, (9, "raise", ""), timeout_s=60)
    assert one == "ValueError: enough"
    assert zero.startswith("ExchangeError: rank 0: step ")
    assert zero.endswith(("from rank 1: it has closed its store: it stopped early", "has ended")), zero


def test_a_sample_that_its_owner_cannot_read_is_named_everywhere() -> None:
    bad = sampler.batch(5, 1, 8, 2)[1]  # what rank 1 reads for step 1, and gives to rank 0 or uses itself later
    zero, one = launch(caught, 2, (99, "none", "", bad), timeout_s=60)
    what = f"rank 1: sample {bad} (case_0{bad}): its last 17 bytes are missing"
    assert one == f"DataError: {what}"
    assert zero.startswith("ExchangeError: rank 0: step ")
    assert zero.endswith(f"from rank 1: it has closed its store: {what}") or "rank 1 does not answer" in zero


def test_a_sample_that_cannot_be_read_when_another_rank_needs_it() -> None:
    """The owner says so in the place of the sample: here it reads everything for the other rank, too."""
    zero, one = launch(caught_split, 2, (3,), timeout_s=60)
    what = "rank 1: sample 3 (case_03): its last 17 bytes are missing"
    assert one == f"DataError: {what}"
    assert zero == f"DataError: rank 0: step 1, sample 3 (case_03) from rank 1: {what}"


def test_one_rank_raises_at_the_step_that_needs_the_sample() -> None:
    source = Numbers(SHAPES, bad=5)
    with Store(source, mw.Plan.uniform(), lambda step: [step], budget_bytes=MANY, last=8) as store:
        batches = iter(store)
        assert [next(batches).step for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(DataError, match=r"rank 0: sample 5 \(case_05\): its last 17 bytes are missing"):
            next(batches)
        assert len(names()) > 0
    assert names() == []


def test_samples_of_two_sizes_in_one_batch_are_refused_at_their_step() -> None:
    source, order = Numbers((*SHAPES[:4], (1, 2, 3))), [[0, 1], [2, 3], [0, 4], [4, 4]]
    with Store(source, mw.Plan.uniform(), order.__getitem__, budget_bytes=MANY, last=4) as store:
        assert [store.batch(step).indices for step in range(2)] == [(0, 1), (2, 3)]
        with pytest.raises(DataError, match=r"step 2: sample 0 \(case_00\) has shape \(6, 5, 4\) but 4 \(case_04\)"):
            store.batch(2)


def test_a_budget_that_is_too_small_is_refused_with_the_numbers() -> None:
    with (
        Store(Numbers(SHAPES), mw.Plan.uniform(), lambda step: [0], budget_bytes=3000) as store,
        pytest.raises(ConfigError, match=r"budget_bytes = 3000 is too small for rank 0: step 0 alone has 3312 bytes"),
    ):
        for _ in store:
            pass


def test_steps_come_in_order_and_not_after_closing() -> None:
    store = Store(Numbers(SHAPES), mw.Plan.uniform(), lambda step: [step % 8], budget_bytes=MANY, last=3)
    with pytest.raises(ConfigError, match="step 1 was asked for, but the store is at step 0"):
        store.batch(1)
    assert torch.is_tensor(store.batch(0)["image"])
    store.close()
    store.close()
    with pytest.raises(ConfigError, match="is closed"):
        store.batch(1)
    assert names() == []


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.data.pipeline.CLOSE_S", 0.2)
    held = threading.Event()
    source = Numbers(SHAPES)
    monkeypatch.setattr(source, "read", lambda *_: held.wait(60))
    store = Store(source, mw.Plan.uniform(), lambda step: [step % 8], budget_bytes=MANY)
    begin_s = time.monotonic()
    store.close()
    assert time.monotonic() - begin_s < 55  # of the 60 s that the read would take
    held.set()
    for thread in threading.enumerate():
        if thread.name == "meshwright-read":
            thread.join(10)
    assert names() == []
