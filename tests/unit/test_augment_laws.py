"""Augmentation on shards is augmentation of the whole, bit for bit: every transform, any chain, any cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transform_draws import KINDS, Reading, chains, sample, shapes

import meshwright as mw
from meshwright.data.augmented import held
from meshwright.data.rearrange import Flip
from meshwright.data.transforms import Fields, Shape, Transform, read, source_spans
from meshwright.errors import DataError

LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
VOLUMES = ("image", "second", "label")
AXES = ("depth", "height", "width")


def parts_of(shape: Shape, ways: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The spans of every rank of a mesh that cuts the last dims `ways` times."""
    plan = mw.Plan.uniform(**dict(zip(AXES[-len(ways) :], ways, strict=True)))
    return [mw.interval((1, 1, *shape), plan, rank)[2:] for rank in range(plan.ranks)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():  # zeros have signs
        bits = torch.int32 if a.dtype == torch.float32 else torch.int64
        a, b = a.contiguous().view(bits), b.contiguous().view(bits)
    return torch.equal(a, b)


def see_law(transform: Transform, shape: Shape, ways: tuple[int, ...]) -> Fields:
    """Every rank's part equals its cut of the whole; returns the whole."""
    fields = sample(shape)
    before = {name: field.clone() for name, field in fields.items()}
    after = transform.output_shape(shape)
    whole = read(transform, Reading(fields), tuple(slice(0, size) for size in after), shape, VOLUMES)
    for spans in parts_of(after, ways):
        reading = Reading(fields)
        part = read(transform, reading, spans, shape, VOLUMES)
        assert list(part) == list(fields)
        for name, field in part.items():
            expected = whole[name] if name == "vector" else whole[name][(..., *spans)]
            assert same_bits(field, expected), (name, spans)
    assert all(torch.equal(field, before[name]) for name, field in fields.items())
    return whole


def meshes(rank: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(1, 4) for _ in range(rank)))


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(data=st.data())
def test_one_transform_on_shards_is_that_transform_of_the_whole(kind: str, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    see_law(data.draw(KINDS[kind](shape)), shape, data.draw(meshes(len(shape))))


@settings(LAW, max_examples=150)
@given(data=st.data())
def test_chains_on_shards_are_the_chain_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    see_law(data.draw(chains(shape)), shape, data.draw(meshes(len(shape))))


@pytest.mark.parametrize("kind", ["flip", "roll", "permute", "rotate90", "crop", "linear", "gamma", "noise"])
@LAW
@given(data=st.data())
def test_what_only_moves_or_changes_voxels_reads_each_of_its_part_once(kind: str, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    transform = data.draw(KINDS[kind](shape))
    after = transform.output_shape(shape)
    for spans in parts_of(after, data.draw(meshes(len(shape)))):
        reading = Reading(sample(shape))
        part = read(transform, reading, spans, shape, VOLUMES)
        assert reading.voxels == part["label"].numel()
        assert len(source_spans(transform, spans, shape)) <= 2 ** len(shape)


def test_a_field_of_which_nobody_says_whether_it_is_a_volume_is_refused_by_its_name() -> None:
    """Also where its sizes are those of the volume: a cube of numbers would be flipped."""
    shape, flip = (4, 4, 4), Flip(("depth",))
    fields = {"image": torch.randn(2, *shape), "cube": torch.randn(shape), "vector": torch.randn(4)}
    everything = tuple(slice(0, size) for size in shape)

    def reader(box: tuple[slice, ...]) -> Fields:
        return {name: field[(..., *box)] if name == "image" else field for name, field in fields.items()}

    for wanted in (reader, held(fields, everything)):
        with pytest.raises(DataError, match=r"'cube' has 3 dims, the volume 3: say volumes="):
            read(flip, wanted, everything, shape)
    for wanted in (reader, held(fields, everything, ("image",))):
        whole = read(flip, wanted, everything, shape, ("image",))
        assert torch.equal(whole["image"], fields["image"].flip(1))
        assert torch.equal(whole["cube"], fields["cube"])
        assert torch.equal(whole["vector"], fields["vector"])
    cut = read(flip, held(fields, everything, ("image", "cube")), everything, shape, ("image", "cube"))
    assert torch.equal(cut["cube"], fields["cube"].flip(0))
