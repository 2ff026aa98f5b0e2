"""Threads that read ahead: how many, and that their number changes nothing but the time."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import meshwright as mw
from meshwright.data.prefetch import MOST_WORKERS, Pace, Workers, workers_for
from meshwright.data.store import Store
from meshwright.errors import ConfigError
from store_jobs import MANY, Numbers

seconds = st.integers(0, 10**6).map(float)  # whole, so that no rounding enters the law


@given(seconds, seconds, st.integers(1, 64))
def test_as_many_as_keep_pace_and_one_more(read_s: float, step_s: float, most: int) -> None:
    count = workers_for(read_s, step_s, most)
    assert 1 <= count <= most
    if count < most:
        assert (count - 1) * step_s >= read_s, "without the spare one they keep pace"
        assert (count - 2) * step_s < read_s, "no more than that"


def test_examples() -> None:
    assert workers_for(0.0, 1.0) == 1
    assert workers_for(0.5, 1.0) == 2
    assert workers_for(3.5, 1.0) == 5
    assert workers_for(1.0, 0.0) == MOST_WORKERS
    assert workers_for(math.inf, 1.0) == MOST_WORKERS


def test_the_running_mean_starts_at_the_first_value() -> None:
    pace = Pace()
    assert not pace.known
    pace.saw_read(4.0)
    pace.saw_step(2.0)
    assert pace.known
    assert (pace.read_s, pace.step_s) == (4.0, 2.0)
    pace.saw_read(8.0)
    assert pace.read_s == 5.0


def test_threads_come_and_go() -> None:
    turn, stop, at_work = threading.Semaphore(0), threading.Event(), set()

    def work() -> bool:
        turn.acquire()
        at_work.add(threading.get_ident())
        return not stop.is_set()

    workers = Workers(work, "test-workers")
    workers.resize(5)
    workers.resize(2)
    for _ in range(20):
        turn.release()
    alive = [t for t in threading.enumerate() if t.name == "test-workers"]
    assert workers.count == 2
    stop.set()
    for _ in range(10):
        turn.release()
    assert workers.join(10)
    for thread in alive:  # those that were too many end by themselves, a moment later
        thread.join(10)
    assert not any(thread.is_alive() for thread in alive)


@pytest.mark.parametrize("workers", [1, 3, 8, None])
def test_the_order_does_not_depend_on_the_number_of_threads(workers: int | None) -> None:
    source = Numbers(((3, 2, 4),) * 12)
    delays = [0.003 * ((7 * i) % 5) for i in range(12)]
    read = source.read

    def uneven(index: int, spans: list[slice]) -> dict[str, torch.Tensor]:
        time.sleep(delays[index])  # later ones are ready earlier
        return read(index, spans)

    source.read = uneven  # type: ignore[method-assign]
    order = [[i, (5 * i) % 12] for i in range(12)] * 2
    with Store(source, mw.Plan.uniform(), order.__getitem__, budget_bytes=MANY, last=24, workers=workers) as store:
        for number, batch in enumerate(store):
            want = torch.cat([source.part(i, [slice(0, 3), slice(0, 2), slice(0, 4)])["image"] for i in order[number]])
            assert torch.equal(batch["image"], want)
        if workers:
            assert store.workers == workers
    assert number == 23


@pytest.mark.parametrize(("read_s", "workers"), [(1.0, MOST_WORKERS), (0.025, 4), (0.001, 2)])
def test_slow_reading_gets_more_threads_and_fast_reading_few(
    read_s: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured times are replaced: what a loaded machine measures is no one's business here."""
    read, step = Pace.saw_read, Pace.saw_step
    monkeypatch.setattr(Pace, "saw_read", lambda pace, _: read(pace, read_s))
    monkeypatch.setattr(Pace, "saw_step", lambda pace, _: step(pace, 0.01))
    source = Numbers(((2, 2, 2),) * 40)
    with Store(source, mw.Plan.uniform(), lambda step: [step], budget_bytes=MANY, last=40) as store:
        for _ in store:
            pass
        assert store.workers == workers
        stats = store.stats
    assert sum(source.reads.values()) == 40
    assert stats.steps == 40
    assert stats.read_s > 0


def test_what_is_handed_out_belongs_to_the_caller() -> None:
    source = Numbers(((3, 3, 3),) * 2)
    with Store(source, mw.Plan.uniform(), lambda step: [step % 2], budget_bytes=MANY, last=6) as store:
        for batch in store:
            want = source.part(batch.indices[0], [slice(0, 3)] * 3)["image"]
            assert torch.equal(batch["image"], want)
            batch["image"].fill_(-1)


def test_wrong_arguments() -> None:
    source, plan = Numbers(((3, 3, 3),)), mw.Plan.uniform()
    with pytest.raises(ConfigError, match="budget_bytes = 0"):
        Store(source, plan, lambda step: [0], budget_bytes=0)
    with pytest.raises(ConfigError, match="workers = 0"):
        Store(source, plan, lambda step: [0], budget_bytes=MANY, workers=0)
    with pytest.raises(ConfigError, match="needs 2 ranks, the plan data=1 has 1"):
        Store(source, plan, lambda step: [0], budget_bytes=MANY, reading=mw.Plan.uniform(depth=2))
