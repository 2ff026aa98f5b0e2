"""What is drawn depends on seed and index alone: augmentation and the order of samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.data import sampler
from meshwright.data.augment import Augmentation, Draw, apply, draw

EVERYTHING = Augmentation(flip=("depth", "height", "width"), scale=0.3, shift=0.2)


def test_the_same_seed_and_index_draw_the_same_whatever_was_drawn_before() -> None:
    expected = draw(EVERYTHING, 3, 17)
    np.random.default_rng(0).random(5)
    torch.manual_seed(9)
    draw(EVERYTHING, 3, 16)
    assert draw(EVERYTHING, 3, 17) == expected
    assert draw(EVERYTHING, 3, 18) != expected
    assert draw(EVERYTHING, 4, 17) != expected


def test_draws_fill_their_ranges() -> None:
    drawn = [draw(EVERYTHING, 0, index) for index in range(2000)]
    for values, centre, width in (([d.scale for d in drawn], 1, 0.3), ([d.shift for d in drawn], 0, 0.2)):
        assert max(abs(value - centre) for value in values) <= width
        assert max(values) - min(values) > 1.9 * width
        assert abs(np.mean(values) - centre) < 0.05 * width
    for dim in (-3, -2, -1):
        assert 900 < sum(dim in d.flip for d in drawn) < 1100
    assert len({d.flip for d in drawn}) == 8


def test_switching_one_thing_off_leaves_the_rest_as_it_was() -> None:
    for index in range(20):
        full, less = draw(EVERYTHING, 0, index), draw(Augmentation(flip=("height",), scale=0.3), 0, index)
        assert less == Draw(tuple(dim for dim in full.flip if dim == -2), full.scale, 0.0)
    assert draw(Augmentation(), 0, 0) == Draw((), 1.0, 0.0)


def test_apply_moves_image_and_label_together_and_changes_no_argument() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 4, 5, 6), dtype=torch.uint8)
    image = label.unsqueeze(1).float()
    before = image.clone(), label.clone()
    new_image, new_label = apply(Draw((-3, -1), 2.0, 0.5), image, label)
    assert torch.equal(new_label, label.flip(1, 3))
    assert torch.equal(new_image, new_label.unsqueeze(1) * 2.0 + 0.5)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="'left' is no dim; choose from depth, height, width"):
        Augmentation(flip=("left",))
    with pytest.raises(ValueError, match=r"scale 1\.0"):
        Augmentation(scale=1.0)
    with pytest.raises(ValueError, match=r"shift -0\.1"):
        Augmentation(shift=-0.1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), size=st.integers(1, 9), epochs=st.integers(1, 4))
def test_every_sample_comes_once_an_epoch(seed: int, count: int, size: int, epochs: int) -> None:
    steps = -(-count * epochs // size)
    stream = [index for step in range(steps) for index in sampler.batch(seed, step, count, size)]
    for epoch in range(epochs):
        seen = stream[epoch * count : (epoch + 1) * count]
        assert sorted(seen) == list(range(count))
        assert tuple(seen) == sampler.order(seed, epoch, count)


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [sampler.order(seed, epoch, 20) for seed in range(3) for epoch in range(3)]
    assert max(Counter(orders).values()) == 1


def test_a_batch_of_nothing_is_refused() -> None:
    for arguments in ((0, -1, 3), (0, 0, 0), (0, 0, 3, 0)):
        with pytest.raises(ValueError, match="samples in batches"):
            sampler.batch(*arguments)
