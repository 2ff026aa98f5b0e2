"""What is drawn for a sample: a function of seed and place, in its ranges, one thing independent of the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_augment_laws import meshes, parts_of, see_law
from torch import Tensor
from transform_draws import Reading, sample

import meshwright as mw
from meshwright.data.augmented import Augmented, held
from meshwright.data.intensity import Gamma, Linear, Noise
from meshwright.data.rearrange import Crop, Flip, Permute, Roll
from meshwright.data.recipe import Recipe, turned
from meshwright.data.source import Field, Part, ReadStats, batch_shape, read_batch, widened
from meshwright.data.transforms import Compose, read
from meshwright.data.warp import Affine, Elastic
from meshwright.errors import DataError

EVERYTHING = Recipe(
    rotate_deg=15.0,
    zoom=0.2,
    elastic=1.5,
    elastic_spacing=8.0,
    patch=(9, 9, 7),
    permute=("depth", "height"),
    rotate90=("depth", "height"),
    flip=("depth", "width"),
    roll=("height", "width"),
    gamma=0.5,
    gamma_range=(-3.0, 3.0),
    scale=0.1,
    shift=0.2,
    noise=0.3,
)
SHAPE = (12, 11, 13)
OFF: dict[str, Any] = {
    "rotate_deg": 0.0,
    "zoom": 0.0,
    "elastic": 0.0,
    "patch": None,
    "permute": (),
    "rotate90": (),
    "flip": (),
    "roll": (),
    "gamma": 0.0,
    "scale": 0.0,
    "shift": 0.0,
    "noise": 0.0,
}


def steps(drawn: Compose, kind: type) -> list[Any]:
    """All steps of a kind, in nested chains too."""
    found = []
    for step in drawn.transforms:
        found += steps(step, kind) if isinstance(step, Compose) else [step] * isinstance(step, kind)
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 2**40), position=st.integers(0, 10**9))
def test_the_whole_recipe_on_shards_is_the_recipe_of_the_whole(data: st.DataObject, seed: int, position: int) -> None:
    drawn = EVERYTHING.draw(seed, position, SHAPE)
    assert drawn == EVERYTHING.draw(seed, position, SHAPE)
    see_law(drawn, SHAPE, data.draw(meshes(3)))


def test_draws_fill_their_ranges() -> None:
    drawn = [EVERYTHING.draw(0, position, SHAPE) for position in range(600)]

    def ranged(values: list[float], low: float, high: float) -> None:
        assert low <= min(values)
        assert max(values) <= high
        assert max(values) - min(values) > 0.95 * (high - low)

    ranged([steps(d, Linear)[0].scale for d in drawn], 0.9, 1.1)
    ranged([steps(d, Linear)[0].shift for d in drawn], -0.2, 0.2)
    ranged([steps(d, Noise)[0].sigma for d in drawn], 0.0, 0.3)
    ranged([math.log(steps(d, Gamma)[0].gamma) for d in drawn], -math.log(1.5), math.log(1.5))
    zooms = [abs(torch.linalg.det(torch.tensor(steps(d, Affine)[0].matrix, dtype=torch.float64))) for d in drawn]
    ranged([math.log(zoom) / 3 for zoom in zooms], -math.log(1.2), math.log(1.2))
    ranged([shift for d in drawn for shift in steps(d, Roll)[0].shifts[:1]], 0, 8)
    for dim, last in enumerate((3, 2, 6)):
        assert {steps(d, Crop)[0].start[dim] for d in drawn} == set(range(last + 1))
    flips = Counter(steps(d, Flip)[-1].dims for d in drawn)
    assert set(flips) == {(), ("depth",), ("width",), ("depth", "width")}
    assert min(flips.values()) > 100
    assert len({steps(d, Elastic)[0].key for d in drawn}) == len({steps(d, Noise)[0].key for d in drawn}) == 600
    cubes = [Recipe(permute=("depth", "height", "width")).draw(0, p, (4, 4, 4)) for p in range(200)]
    assert len({steps(d, Permute)[0].order for d in cubes}) == 6
    turns = [Recipe(rotate90=("depth", "height", "width")).draw(0, p, (4, 4, 4)) for p in range(300)]
    assert len(set(turns)) == 13  # none, 6 half turns as they are written, 6 quarter turns


def test_switching_one_thing_off_leaves_the_rest_as_it_was() -> None:
    for off, nothing in OFF.items():
        if off in ("patch", "rotate_deg", "zoom", "scale", "shift"):  # these share a step with others
            continue
        less = replace(EVERYTHING, **{off: nothing}).draw(3, 8, SHAPE).transforms
        full = EVERYTHING.draw(3, 8, SHAPE).transforms
        assert [step for step in full if step in less] == list(less), off
        assert len(less) == len(full) - 1
    assert replace(EVERYTHING, **OFF).draw(0, 0, SHAPE) == Compose()


def test_nothing_means_that_nothing_is_switched_on() -> None:
    assert Recipe().is_nothing
    assert replace(EVERYTHING, **OFF).is_nothing
    for on in OFF:
        assert not replace(EVERYTHING, **{key: value for key, value in OFF.items() if key != on}).is_nothing


def test_turns_are_turns() -> None:
    matrix = torch.tensor(turned([0.3, -0.2, 0.9], 1.25), dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64) / 1.25**2)
    assert torch.linalg.det(matrix) > 0
    quarter = turned([0.0, 0.0, math.pi / 2], 1.0)  # about W: in the plane of D and H
    expected = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(torch.tensor(quarter).abs(), expected.abs(), atol=1e-7, rtol=0)


def test_turns_are_of_space_and_not_of_voxels() -> None:
    """In mm every distance becomes the same multiple, whatever the size of voxels; for cubes no bit changes."""
    recipe, spacing = Recipe(rotate_deg=40, zoom=0.3, halo=1e9, patch=(6, 5, 4)), (3.0, 1.0, 0.5)
    for position in range(20):
        cubes, thick = (recipe.draw(0, position, (9, 8, 7), spacing_mm=mm).transforms for mm in ((2.0,) * 3, spacing))
        assert cubes == recipe.draw(0, position, (9, 8, 7)).transforms
        assert thick[1:] == cubes[1:]
        own, scale = torch.tensor(thick[0].matrix, dtype=torch.float64), torch.diag(torch.tensor(spacing).double())
        in_mm = scale @ own @ scale.inverse()
        torch.testing.assert_close(in_mm, torch.tensor(cubes[0].matrix, dtype=torch.float64))
        size = torch.linalg.det(in_mm) ** (2 / 3)
        torch.testing.assert_close(in_mm @ in_mm.T, torch.eye(3, dtype=torch.float64) * size)
    with pytest.raises(DataError, match=r"voxels of \(1.0, 0.0, 1.0\) mm \(D, H, W\): turns need sizes above 0"):
        recipe.draw(0, 0, (9, 8, 7), spacing_mm=(1.0, 0.0, 1.0))


def test_a_ball_in_thick_slices_stays_a_ball() -> None:
    """What is turned about a ball's middle is the same ball: slices 3 mm apart of voxels of 1 mm."""
    shape, spacing = (13, 37, 37), torch.tensor([3.0, 1.0, 1.0])
    middle = (torch.tensor(shape) - 1) / 2
    places = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"), -1)
    ball = (((places - middle) * spacing).norm(dim=-1) < 12).byte()
    recipe = Recipe(rotate_deg=60, halo=64)
    for position in range(4):
        drawn = recipe.draw(1, position, shape, spacing_mm=spacing.tolist())
        turned_ball = read(drawn, lambda box: {"label": ball[box]}, [slice(0, n) for n in shape], shape)["label"]
        assert (turned_ball != ball).sum() < 0.12 * ball.sum()  # a layer of its surface, by nearest neighbours


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong, message in (
        ({"flip": ("left",)}, "'left' is no dim"),
        ({"rotate90": ("depth",)}, "rotate90 of depth: two dims"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"elastic": 20.0}, "does not fold"),
        ({"gamma": 0.1, "gamma_range": (1.0, 1.0)}, "low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**wrong)  # type: ignore[arg-type]
    for position in range(20):  # also where the turn that is drawn would be none
        with pytest.raises(DataError, match="rotate90 needs dims of one size, not depth 4, width 6"):
            Recipe(rotate90=("depth", "width")).draw(0, position, (4, 5, 6))
    with pytest.raises(DataError, match="does not fit into a sample"):
        EVERYTHING.draw(0, 0, (4, 20, 20))
    with pytest.raises(DataError, match="D, H, W"):
        Recipe(noise=1.0).draw(0, 0, (4, 20))


class InMemory:
    """A source of two samples with a vector field, which counts what is read."""

    names: tuple[str, ...] = ("a", "b")
    classes: tuple[str, ...] = ("other", "organ")
    fields: Mapping[str, Field] = {
        "image": Field("CDHW", (2,), torch.float32),
        "label": Field("DHW", (), torch.uint8),
        "vector": Field("K", (2,), torch.float32),
    }

    def __init__(self) -> None:
        self.samples = [Reading({k: v for k, v in sample(SHAPE, i).items() if k in self.fields}) for i in range(2)]
        self.reads = 0

    def shape(self, index: int) -> tuple[int, int, int]:
        return SHAPE

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return 1.0, 1.0, 1.0

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        self.reads += 1
        fields: dict[str, Tensor] = {name: field[None] for name, field in self.samples[index](spans).items()}
        return Part(fields, ReadStats(read_bytes=1))


def test_a_batch_of_augmented_samples_is_read_in_parts() -> None:
    kept, fresh = InMemory(), InMemory()
    drawn = [EVERYTHING.draw(1, position, SHAPE) for position in (10, 11, 12)]
    source = Augmented(kept, (1, 0, 1), drawn, fresh)
    shape = batch_shape(source, range(3))
    assert shape == (3, 2, 9, 9, 7)
    assert source.names == ("b", "a", "b")
    whole = read_batch(source, range(3), tuple(slice(0, size) for size in shape))
    assert whole.stats.read_bytes == fresh.reads > 0
    assert kept.reads == 0
    assert not torch.equal(whole.image[0], whole.image[2])  # one sample, two places, two draws
    plan = mw.Plan.uniform(data=2, depth=2, width=3)
    for rank in range(plan.ranks):
        spans = mw.interval(shape, plan, rank)
        part = read_batch(source, range(3), spans)
        assert torch.equal(part.image, whole.image[spans])
        assert torch.equal(part.label, whole.label[(spans[0], *spans[2:])])
        assert torch.equal(part["vector"], whole["vector"][spans[0]])
    bright = Augmented(kept, (0,), [Compose((Noise(1.0, 1),))], fresh)
    before = fresh.reads
    for spans in parts_of(SHAPE, (2, 2, 2)):
        bright.read(0, spans)
    assert (kept.reads, fresh.reads) == (8, before)
    with pytest.raises(ValueError, match="2 samples but 1 transforms"):
        Augmented(kept, (0, 1), [Compose()])


def test_a_part_with_a_halo_is_augmented_in_memory() -> None:
    fields = {name: field for name, field in sample(SHAPE).items() if name != "second"}
    near = Recipe(rotate_deg=4.0, elastic=1.5, elastic_spacing=8.0, halo=2.0, gamma=0.5, noise=0.2)
    moves = 0
    for position in range(6):
        drawn = near.draw(2, position, SHAPE)
        whole = read(drawn, Reading(fields), [slice(0, n) for n in SHAPE], SHAPE)
        for spans in parts_of(SHAPE, (3, 2, 8)):
            wide = widened(spans, SHAPE, 8)
            part = {name: field if name == "vector" else field[(..., *wide)] for name, field in fields.items()}
            found = read(drawn, held(part, wide), spans, SHAPE)
            assert torch.equal(found["image"], whole["image"][(..., *spans)])
            assert torch.equal(found["label"], whole["label"][spans])
            assert torch.equal(found["vector"], fields["vector"])
            moves += int(wide != tuple(slice(0, n) for n in SHAPE))
    assert moves > 0
    wide = (slice(0, 6), slice(0, 11), slice(0, 13))
    part = {name: field[(..., *wide)] for name, field in fields.items() if name != "vector"}
    with pytest.raises(DataError, match=r"needs the voxels .* but this rank holds .* keep a wider halo"):
        read(Flip(("depth",)), held(part, wide), wide, SHAPE)
