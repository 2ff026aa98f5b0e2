"""The order of samples: whatever happens to a run, each sample exactly once an epoch in one order."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright as mw
from meshwright.data import sampler
from meshwright.data.orders import Stratified, Weighted, balanced, chairmen
from meshwright.data.sampler import Order, Sampler, Shuffled
from meshwright.errors import DataError

HISTORIES = 1000


def reference(order: Order, seed: int, length: int) -> list[int]:
    """The stream of samples of a run that nothing ever happened to, drawn one by one."""
    return [Sampler(order, seed, position).batch(1)[0] for position in range(length)]


def what_ranks_read(at: Sampler, size: int, ranks: int) -> list[int]:
    """The batch as `ranks` ranks see it: each computes the order by itself and keeps its own rows."""
    plan = mw.Plan.uniform(data=ranks)
    rows = [mw.interval((size, 1), plan, rank)[0] for rank in range(ranks)]
    return [index for row in rows for index in at.batch(size)[row]]


def live(chance: random.Random, order: Order, seed: int, least: int) -> list[int]:
    """Train `least` samples or more through kills and resizes: what the surviving steps were trained on.

    A kill loses every step since the last checkpoint; what resumes has read the checkpoint from its JSON, and has
    another number of ranks and another batch size.
    """
    trained: list[int] = []
    saved, size, ranks = json.dumps(Sampler(order, seed).save()), 1, 1
    at = Sampler(order, seed)
    while len(trained) < least:
        event = chance.random()
        if event < 0.2:  # killed and started again
            at = Sampler(order, seed).load(json.loads(saved))
            del trained[at.seen :]
            ranks = chance.randint(1, 4)
            size = chance.randint(ranks, 9)
        elif event < 0.5:
            saved = json.dumps(at.save())
        else:
            trained += what_ranks_read(at, size, ranks)
            at = at.after(size)
    assert at.seen == len(trained)
    return trained


def any_order(chance: random.Random) -> Order:
    count = chance.randint(1, 12)
    kind = chance.randrange(3)
    if kind == 0:
        return Shuffled(count)
    if kind == 1:
        return Stratified(tuple(chance.choices("abc", k=count)))
    return Weighted(tuple(chance.random() for _ in range(count)), chance.randint(1, 12))


def test_every_sample_comes_once_an_epoch_and_in_one_order_through_1000_histories() -> None:
    for history in range(HISTORIES):
        chance = random.Random(history)
        order = any_order(chance)
        epochs = chance.randint(1, 3)
        stream = live(chance, order, history, order.count * epochs)
        assert stream == reference(order, history, len(stream)), history
        for epoch in range(epochs if not isinstance(order, Weighted) else 0):
            seen = stream[epoch * order.count : (epoch + 1) * order.count]
            assert sorted(seen) == list(range(order.count)), history


def test_the_order_of_a_seed_is_the_same_on_every_machine_and_with_every_version() -> None:
    assert sampler.order(0, 0, 10) == (3, 8, 1, 5, 7, 9, 4, 6, 0, 2)
    assert sampler.order(3, 1, 10) == (6, 8, 3, 7, 5, 2, 9, 1, 4, 0)
    assert Sampler(Weighted((1.0, 0.0, 3.0)), 5).batch(9) == (0, 2, 0, 2, 0, 2, 0, 0, 2)
    assert Sampler(Stratified(tuple("aababbaa")), 5).batch(8) == (0, 4, 3, 6, 5, 7, 2, 1)


def test_orders_are_uniform() -> None:
    """Where sample 0 comes, and what comes first, over 2,000 seeds: chi-squared with 5 degrees, 0.1 % beyond 20.5."""
    for counts in (
        Counter(sampler.order(seed, 0, 6).index(0) for seed in range(2000)),
        Counter(sampler.order(seed, 0, 6)[0] for seed in range(2000)),
        Counter(sampler.order(0, epoch, 6)[0] for epoch in range(2000)),
    ):
        assert sum((counts[place] - 2000 / 6) ** 2 / (2000 / 6) for place in range(6)) < 20.5


def test_weighted_draws_follow_the_weights() -> None:
    order = Weighted((1.0, 0.0, 2.0, 5.0, 0.0), 80_000)
    counts = Counter(order.span(1, 0, 0, order.count).tolist())
    assert set(counts) == {0, 2, 3}
    for index, expected in ((0, 10_000), (2, 20_000), (3, 50_000)):
        assert abs(counts[index] - expected) < 5 * np.sqrt(expected)
    assert order.span(1, 0, 0, 50).tolist() != order.span(1, 1, 0, 50).tolist()


def test_balanced_weights_make_classes_equally_likely() -> None:
    classes = ["rare"] * 2 + ["common"] * 98
    drawn = Weighted(balanced(classes), 10_000).span(0, 0, 0, 10_000)
    assert abs((drawn < 2).mean() - 0.5) < 0.025


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    at=st.integers(0, 200),
    size=st.integers(1, 20),
)
def test_every_batch_holds_the_classes_in_proportion(counts: list[int], seed: int, at: int, size: int) -> None:
    classes = [name for name, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(classes)
    found = Counter(classes[index] for index in Sampler(Stratified(tuple(classes)), seed, at).batch(size))
    for name, count in enumerate(counts):
        assert abs(found[name] - size * count / len(classes)) < 2


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=7))
def test_every_beginning_holds_the_classes_in_proportion(counts: list[int]) -> None:
    sequence, seen = chairmen(counts), Counter[int]()
    for place, name in enumerate(sequence, 1):
        seen[name] += 1
        for other, count in enumerate(counts):
            assert abs(seen[other] - place * count / len(sequence)) < 1
    assert seen == Counter(dict(enumerate(counts)))


def test_within_a_class_the_order_changes_with_the_epoch() -> None:
    order = Stratified(("a",) * 30 + ("b",) * 30)
    assert order.span(0, 0, 0, 60).tolist() != order.span(0, 1, 0, 60).tolist()
    assert order.span(0, 0, 0, 60).tolist() != order.span(1, 0, 0, 60).tolist()


def test_what_does_not_fit_is_refused() -> None:
    at = Sampler(Shuffled(5), 3, 7)
    assert Sampler(Shuffled(5), 3).load(at.save()) == at
    assert len(json.dumps(at.save())) < 80
    for other, what in (
        (Sampler(Shuffled(6), 3), "samples = 5, this job has samples = 6"),
        (Sampler(Shuffled(5), 4), "seed = 3, this job has seed = 4"),
        (Sampler(Weighted((1.0,) * 5), 3), "order = shuffled, this job has order = weighted"),
    ):
        with pytest.raises(DataError, match=what):
            other.load(at.save())
    for damaged in ({}, {**at.save(), "seen": -1}, {**at.save(), "seen": 1.5}, {**at.save(), "more": 1}):
        with pytest.raises(DataError, match="no saved position"):
            at.load(damaged)
    with pytest.raises(ValueError, match="0 samples"):
        Shuffled(0)
    with pytest.raises(ValueError, match="0 samples"):
        Stratified(())
    with pytest.raises(ValueError, match="size >= 1"):
        at.batch(0)
    for weights, what in (((1.0, -1.0), r"-1\.0 among"), ((0.0, 0.0), "sum is 0"), ((float("nan"),), "nan among")):
        with pytest.raises(ValueError, match=what):
            Weighted(weights)
    with pytest.raises(ValueError, match="0 draws"):
        Weighted((1.0,), 0)
