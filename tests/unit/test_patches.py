"""Patches of samples larger than the plan, and MONAI's transforms on split samples."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_augment_laws import see_law
from transform_draws import Reading, sample

from meshwright.data import patches
from meshwright.data.monai_transforms import monai
from meshwright.data.rearrange import Crop
from meshwright.data.transforms import Compose, read
from meshwright.data.warp import Elastic
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval

EDGES = st.tuples(*(st.integers(1, 12) for _ in range(3)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=EDGES, seed=st.integers(0, 2**40), position=st.integers(0, 10**9))
def test_a_patch_is_inside_and_a_function_of_seed_and_place(
    data: st.DataObject, shape: tuple[int, ...], seed: int, position: int
) -> None:
    size = tuple(data.draw(st.integers(1, n)) for n in shape)
    corner = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    boxes = [tuple(slice(lo, data.draw(st.integers(lo + 1, n))) for lo, n in zip(corner, shape, strict=True))]
    found = patches.draw(shape, size, seed, position, boxes, 0.5)
    assert found == patches.draw(shape, size, seed, position, boxes, 0.5)
    assert found.output_shape(shape) == size


def test_places_are_equally_likely() -> None:
    starts = Counter(patches.draw((4, 3), (2, 2), 0, position).start for position in range(6000))
    assert set(starts) == {(a, b) for a in range(3) for b in range(2)}
    assert sum((count - 1000) ** 2 / 1000 for count in starts.values()) < 20.5  # chi-squared, 5 degrees, 0.1 %


def test_foreground_patches_hold_the_voxel_that_was_drawn() -> None:
    boxes = [(slice(10, 12), slice(0, 1)), (slice(50, 54), slice(97, 98))]  # 2 and 4 voxels
    drawn = [patches.draw((60, 98), (8, 8), 3, p, boxes, 1.0).start for p in range(3000)]
    near = Counter(start[1] for start in drawn)
    assert set(near) == {0, 90}
    assert abs(near[90] - 2000) < 150
    assert {start[0] for start in drawn} == {6, 7, 46, 47, 48, 49}
    mixed = [patches.draw((60, 98), (8, 8), 3, p, boxes, 0.3).start[1] for p in range(3000)]
    assert abs(sum(start in (0, 90) for start in mixed) - 3000 * (0.3 + 0.7 * 2 / 91)) < 150
    assert patches.draw((60, 98), (8, 8), 3, 1, (), 1.0) == patches.draw((60, 98), (8, 8), 3, 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=EDGES)
def test_tiles_hold_every_voxel(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = tuple(data.draw(st.integers(1, n)) for n in shape)
    seen = torch.zeros(shape)
    for crop in patches.tiles(shape, size):
        assert crop.output_shape(shape) == size
        seen[tuple(slice(lo, lo + s) for lo, s in zip(crop.start, size, strict=True))] += 1
    assert seen.min() >= 1
    if all(n % s == 0 for n, s in zip(shape, size, strict=True)):
        assert seen.max() == 1


def test_boxes_of_a_label_hold_its_foreground_once() -> None:
    label = torch.randint(0, 30, (17, 20, 9), generator=torch.Generator().manual_seed(0)) == 0
    covered = torch.zeros(label.shape)
    for box in patches.boxes_of(label, 6):
        covered[box] += 1
        cell = label[box]
        for dim in range(3):
            assert cell.select(dim, 0).any()
            assert cell.select(dim, -1).any()
    assert covered.max() == 1
    assert (covered[label] == 1).all()
    assert patches.boxes_of(torch.zeros(4, 4, 4), 2) == ()


def test_a_patch_of_a_deformed_sample_is_split_exactly() -> None:
    patch = patches.draw((20, 21, 22), (9, 7, 8), 5, 12)
    see_law(Compose((Elastic(8.0, 2.0, 9), patch)), (20, 21, 22), (2, 3, 2))


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"a patch of \(4, 5\) voxels does not fit into a sample of shape \(4, 4\)"):
        patches.draw((4, 4), (4, 5), 0, 0)
    with pytest.raises(DataError, match="does not fit"):
        patches.tiles((4, 4), (4,))
    with pytest.raises(ValueError, match="share 2"):
        patches.draw((4, 4), (2, 2), 0, 0, share=2)


@pytest.fixture(scope="module")
def mt() -> ModuleType:
    import monai.transforms as found  # seconds: only for the tests that need it

    return found


def accepted(mt: ModuleType) -> dict[str, Any]:
    return {
        "range": mt.ScaleIntensityRange(-2.0, 2.0, 0.0, 1.0, clip=True),
        "bare range": mt.ScaleIntensityRange(-2.0, 3.0),
        "normalize": mt.NormalizeIntensity(0.1, 1.7),
        "nonzero": mt.NormalizeIntensity(0.1, 1.7, nonzero=True),
        "channels": mt.NormalizeIntensity([0.1, 0.2], [1.7, 1.1], channel_wise=True),
        "shift": mt.ShiftIntensity(0.3),
        "factor": mt.ScaleIntensity(minv=None, maxv=None, factor=0.1),
        "threshold": mt.ThresholdIntensity(0.2, above=False, cval=-1.0),
        "fill": mt.SignalFillEmpty(0.5),
        "cast": mt.CastToType(torch.float64),
        "compose": mt.Compose([mt.ShiftIntensity(0.3), mt.Compose([mt.Identity(), mt.ScaleIntensityRange(0, 2)])]),
    }


def test_pointwise_transforms_of_monai_are_exact_on_parts(mt: ModuleType) -> None:
    fields = {name: field for name, field in sample((7, 6, 5)).items() if name in ("image", "label")}
    fields["image"][0, :2] = 0
    for name, transform in accepted(mt).items():
        reading = Reading({**fields, "vector": torch.zeros(2)})
        for spans in (
            (slice(0, 7), slice(0, 6), slice(0, 5)),
            (slice(2, 4), slice(5, 6), slice(1, 5)),
            (slice(0, 0),) * 3,
        ):
            part = read(monai(transform, fields=("image",)), reading, spans, (7, 6, 5))
            expected = torch.as_tensor(transform(fields["image"].clone()))[(..., *spans)]
            assert torch.equal(part["image"], expected), (name, spans)
            assert part["image"].dtype == expected.dtype
            assert type(part["image"]) is torch.Tensor
            assert torch.equal(part["label"], fields["label"][spans])
    before = fields["image"].clone()
    box = tuple(Interval(0, size) for size in (7, 6, 5))
    for name, transform in accepted(mt).items():  # NormalizeIntensity writes into what it is given
        monai(transform, fields=("image",)).build([fields], box, (7, 6, 5))
        assert torch.equal(fields["image"], before), name
    labels = read(
        monai(mt.MapLabelValue([1, 2], [2, 1], dtype=torch.uint8), fields=("label",)),
        Reading({"label": torch.arange(4).byte().reshape(2, 2, 1)}),
        (slice(0, 2), slice(0, 2), slice(0, 1)),
        (2, 2, 1),
    )
    assert labels["label"].flatten().tolist() == [0, 2, 1, 3]


def test_every_other_transform_of_monai_is_refused_with_the_reason(mt: ModuleType) -> None:
    class Own(mt.ShiftIntensity):  # type: ignore[misc, name-defined]
        def __call__(self, img: Any, offset: Any = None) -> Any:
            return img - img.mean()

    for transform, reason in (
        (mt.RandGaussianNoise(), "RandGaussianNoise cannot .* generator of its own"),
        (mt.RandFlip(), "generator of its own"),
        (mt.NormalizeIntensity(), "measures the array .* give subtrahend and divisor"),
        (mt.NormalizeIntensity(subtrahend=1.0), "measures the array"),
        (mt.NormalizeIntensity(torch.zeros(2, 4, 4, 4), 1.0), "as numbers"),
        (mt.ScaleIntensity(), "measures the array .* ScaleIntensityRange"),
        (mt.AdjustContrast(2.0), "measures the array"),
        (mt.HistogramNormalize(), "measures the array"),
        (mt.Flip(0), "moves voxels .* use Flip"),
        (mt.CenterSpatialCrop(3), "moves voxels"),
        (mt.GaussianSmooth(), "GaussianSmooth cannot .* not known"),
        (mt.ShiftIntensityd("image", 1.0), "dictionary"),
        (mt.Lambda(lambda x: x), "Lambda cannot .* not known"),
        (mt.Compose([mt.ShiftIntensity(1.0), mt.RandFlip()]), "RandFlip cannot"),
        (Own(1.0), "Own cannot .* no transform of MONAI"),
        (torch.relu, "no transform of MONAI"),
    ):
        with pytest.raises(DataError, match=reason):
            monai(transform)
    with pytest.raises(DataError, match=r"Crop cannot augment"):
        monai(Crop((0,), (1,)))
