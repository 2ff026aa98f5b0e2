"""What each augmentation does to a whole sample: against torch, against formulas, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transform_draws import Reading, sample

from meshwright.data.chance import key
from meshwright.data.intensity import Gamma, Linear, Noise
from meshwright.data.rearrange import Crop, Flip, Permute, Roll, rotate90
from meshwright.data.transforms import Compose, Fields, Shape, Transform, read, source_spans
from meshwright.data.warp import Affine, Elastic
from meshwright.errors import DataError
from meshwright.parallel import noise
from meshwright.plan.geometry import Interval

SHAPE = (6, 5, 6)
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def everything(shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def whole(transform: Transform, fields: Fields) -> dict[str, Tensor]:
    reading = Reading(fields)
    spans = everything(transform.output_shape(reading.shape))
    return read(transform, reading, spans, reading.shape, [name for name in fields if name != "vector"])


MOVES: dict[str, tuple[Transform, Callable[[Tensor], Tensor]]] = {
    "flip": (Flip(("depth", "width")), lambda x: x.flip(-3, -1)),
    "roll": (Roll(("height", "width"), (2, -9)), lambda x: x.roll((2, -9), (-2, -1))),
    "permute": (Permute(("width", "height", "depth")), lambda x: x.transpose(-3, -1)),
    "crop": (Crop((1, 0, 3), (4, 5, 2)), lambda x: x[..., 1:5, :, 3:5]),
    **{
        f"rotate90 {times}": (rotate90(("depth", "width"), times), lambda x, t=times: x.rot90(t, (-3, -1)))
        for times in (-1, 0, 1, 2, 3, 4)
    },
    "rotate90 back": (rotate90(("width", "depth"), 1), lambda x: x.rot90(1, (-1, -3))),
    "in their order": (
        Compose((Roll(("depth",), (1,)), Crop((0, 0, 0), (3, 5, 3)), rotate90(("depth", "width")))),
        lambda x: x.roll(1, -3)[..., :3, :, :3].rot90(1, (-3, -1)),
    ),
    "nothing": (Compose(), lambda x: x),
    "shift by whole voxels": (Affine(EYE, (0.0, 2.0, -1.0), fill=0.0), lambda x: moved(x, (0, 2, -1))),
    "identity": (Affine(EYE), lambda x: x),
    "no deformation": (Elastic(4.0, 0.0, 1), lambda x: x),
}


def moved(x: Tensor, by: tuple[int, int, int]) -> Tensor:
    """x at p + by, zero outside."""
    out = torch.zeros_like(x)
    for p in itertools.product(*(range(size) for size in SHAPE)):
        at = tuple(i + j for i, j in zip(p, by, strict=True))
        if all(0 <= i < size for i, size in zip(at, SHAPE, strict=True)):
            out[(..., *p)] = x[(..., *at)]
    return out


@pytest.mark.parametrize("name", MOVES)
def test_moves_do_as_torch_does(name: str) -> None:
    transform, expected = MOVES[name]
    fields = sample(SHAPE)
    found = whole(transform, fields)
    for field in ("image", "second", "label"):
        assert torch.equal(found[field], expected(fields[field])), field
    assert torch.equal(found["vector"], fields["vector"])


def test_affine_is_what_grid_sample_computes() -> None:
    angle, zoom, shift = 0.4, 1.3, (0.3, -0.8, 0.6)
    turn = ((math.cos(angle), -math.sin(angle), 0.1), (math.sin(angle), math.cos(angle), 0.0), (0.0, -0.2, 1.0))
    matrix = tuple(tuple(number * zoom for number in row) for row in turn)
    fields = sample((9, 11, 8))
    shape = torch.tensor([9.0, 11.0, 8.0], dtype=torch.float64)
    centre = (shape - 1) / 2
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"), -1)
    at = (
        (grid - centre) @ torch.tensor(matrix, dtype=torch.float64).T
        + centre
        + torch.tensor(shift, dtype=torch.float64)
    )
    scaled = (at / centre - 1).flip(-1)[None]  # grid_sample counts from W to D, from -1 to 1
    for fill, mode in ((None, "border"), (0.0, "zeros")):
        found = whole(Affine(matrix, shift, fill=fill, label_fill=0), fields)
        for name, how in (("image", "bilinear"), ("second", "bilinear"), ("label", "nearest")):
            x = fields[name].double().reshape(1, -1, 9, 11, 8)
            expected = torch.nn.functional.grid_sample(x, scaled, how, mode, align_corners=True)
            error = (found[name].double().reshape(expected.shape) - expected).abs()
            if how == "bilinear":
                assert error.max() < (1e-5 if name == "image" else 1e-10), (name, mode)
            else:
                assert (error > 0).double().mean() < 0.01  # a coordinate within rounding of half a voxel


def bspline(degree: int, u: float) -> float:
    """The uniform B-spline over 0 … degree + 1, by the recursion of Cox and de Boor."""
    if degree == 0:
        return float(0 <= u < 1)
    return (u * bspline(degree - 1, u) + (degree + 1 - u) * bspline(degree - 1, u - 1)) / degree


def test_elastic_moves_by_a_cubic_b_spline() -> None:
    shape, spacing, amplitude = (7, 12, 9), 3.5, 1.2
    ramps = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    found = whole(Elastic(spacing, amplitude, 5), {"image": torch.stack(ramps), "label": torch.zeros(shape).byte()})
    grid = tuple(math.floor((n - 1) / spacing) + 4 for n in shape)
    furthest = 0.0
    for i in range(3):
        bits = noise.words(noise.mix(noise.mix(5) ^ i), grid, tuple(Interval(0, n) for n in grid), torch.device("cpu"))
        points = (noise.unit(bits) * 2 - 1) * amplitude
        for p in ((0, 0, 0), (3, 6, 4), (6, 11, 8), (2, 9, 1)):
            move = 0.0
            for k in itertools.product(*(range(n) for n in grid)):
                weight = math.prod(bspline(3, p[j] / spacing - k[j] + 3) for j in range(3))
                move += weight * float(points[k])
            expected = min(max(p[i] + move, 0.0), shape[i] - 1.0)
            assert abs(float(found["image"][(i, *p)]) - expected) < 1e-9
            furthest = max(furthest, abs(move))
    assert 0.05 < furthest <= amplitude


def test_labels_stay_labels() -> None:
    fields = sample((8, 8, 8))
    for transform in (Elastic(4.0, 1.5, 3), Affine(((0.9, 0.2, 0), (-0.2, 0.9, 0), (0, 0, 1)), halo=9)):
        found = whole(transform, fields)
        assert set(found["label"].unique().tolist()) <= set(fields["label"].unique().tolist())
        assert found["label"].dtype == torch.uint8
        assert not torch.equal(found["label"], fields["label"])


def test_intensities() -> None:
    fields = sample(SHAPE)
    found = whole(Compose((Linear(2.0, 0.5), Gamma(2.0, -1.0, 3.0, ("second",)))), fields)
    assert torch.equal(found["image"], fields["image"] * 2 + 0.5)
    expected = ((fields["second"] * 2 + 0.5 + 1) / 4) ** 2 * 4 - 1
    torch.testing.assert_close(found["second"], expected)
    assert torch.equal(found["label"], fields["label"])
    low = whole(Gamma(0.5, 0.25, 1.0), fields)["second"]
    assert low.min() == 0.25


def test_noise_is_normal_and_differs_between_fields_channels_and_keys() -> None:
    shape = (40, 41, 42)
    fields = {"a": torch.zeros(2, *shape), "b": torch.zeros(2, *shape), "label": torch.zeros(shape).byte()}
    one, other = whole(Noise(3.0, 1), fields), whole(Noise(3.0, 2), fields)
    drawn = [one["a"][0], one["a"][1], one["b"][0], one["b"][1], other["a"][0]]
    for x in drawn:
        assert abs(x.mean()) < 5 * 3 / math.sqrt(x.numel())
        assert abs(x.std() / 3 - 1) < 5 / math.sqrt(2 * x.numel())
        assert 3.5 < x.abs().max() / 3 < 6.5
    for x, y in itertools.combinations(drawn, 2):
        assert abs((x * y).mean() / 9) < 5 / math.sqrt(x.numel())
    for dim in range(3):
        x = drawn[0]
        assert abs((x * x.roll(1, dim)).mean() / 9) < 5 / math.sqrt(x.numel())
    assert torch.equal(whole(Noise(3.0, 1), fields)["b"], one["b"])


def test_a_crop_after_a_deformation_reads_and_computes_only_what_it_keeps() -> None:
    shape = (64, 64, 64)
    bend, crop = Elastic(16.0, 3.0, key(1, 2)), Crop((20, 30, 10), (8, 8, 8))
    (box,) = source_spans(Compose((bend, crop)), everything((8, 8, 8)), shape)
    for span, start in zip(box, crop.start, strict=True):
        assert start - 4 <= span.start <= start
        assert start + 8 <= span.stop <= start + 8 + 5
    fields = sample(shape)
    inside = whole(Compose((bend, crop)), fields)["image"]
    assert torch.equal(inside, whole(bend, fields)["image"][:, 20:28, 30:38, 10:18])


REFUSED: dict[str, tuple[Transform, Shape, str]] = {
    "permute": (Permute(("height", "depth", "width")), (4, 5, 6), "height cannot take the place of depth: .* 5 and 4"),
    "rotate90": (rotate90(("depth", "width")), (4, 5, 6), "width cannot take the place of depth"),
    "dims": (Permute(("height", "width")), (4, 4, 4), "names 2 dims, the sample has 3"),
    "crop": (Crop((0, 0, 1), (4, 4, 4)), (4, 4, 4), r"crop of \(4, 4, 4\) voxels from \(0, 0, 1\) leaves"),
    "crop of 2": (Crop((0, 0), (4, 4)), (4, 4, 4), "does not fit a sample with 3"),
    "no such dim": (Flip(("depth",)), (4, 4), "depth is no dim of samples with 2"),
    "affine": (Affine(EYE, (0.0, 17.0, 0.0)), (4, 40, 4), r"up to 17\.0 along height, more than the halo of 16"),
    "turn": (Affine(((1, 0, 0), (0, 0, 1), (0, -1, 0))), (4, 100, 4), r"affine map moves .* along height"),
    "affine of 2": (Affine(((1, 0), (0, 1)), (0.0, 0.0)), (4, 4, 4), "2 dims does not fit a sample of 3"),
    "elastic": (Elastic(64.0, 20.0, 1), (9, 9, 9), r"elastic deformation moves voxels by up to 20\.0 along depth"),
    "field": (Linear(fields=("label2",)), (4, 4, 4), "no volume 'label2', only image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(name: str) -> None:
    transform, shape, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        whole(transform, sample(shape))


def test_every_rank_refuses_what_one_rank_must() -> None:
    """A turn moves the middle little and the ends far: the rank in the middle must stop as well."""
    turn = Affine(((1, 0, 0), (0, 1, 0.2), (0, -0.2, 1)), halo=4.0)
    for lo in (0, 40, 80):
        with pytest.raises(DataError, match="more than the halo of 4"):
            source_spans(turn, (slice(0, 4), slice(lo, lo + 20), slice(0, 4)), (4, 100, 4))
    assert source_spans(Compose((turn, Crop((0, 40, 0), (4, 20, 4)))), everything((4, 20, 4)), (4, 100, 4))


def test_what_makes_no_sense_is_refused_at_once() -> None:
    for make, message in (
        (lambda: Flip(("left",)), "'left' is no dim"),
        (lambda: Flip(("depth", "depth")), "names a dim twice"),
        (lambda: Permute(("depth", "width")), "last 2 dims once"),
        (lambda: rotate90(("depth", "width"), 1, 2), "rotate90 of depth and width"),
        (lambda: Roll(("depth",), (1, 2)), "1 dims but 2 shifts"),
        (lambda: Affine(((1.0, 0.0),)), "3 × 3"),
        (lambda: Affine(EYE, (math.nan, 0.0, 0.0)), "must be finite"),
        (lambda: Elastic(4.0, 2.0, 1), "does not fold"),
        (lambda: Elastic(0.5, 0.0, 1), "at least 1 apart"),
        (lambda: Gamma(0.0), "gamma > 0"),
        (lambda: Gamma(1.0, 2.0, 2.0), "low < high"),
        (lambda: Noise(-1.0, 1), "0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(DataError, match="no part of an augmented sample"):
        source_spans(Compose(), (slice(0, 5), slice(0, 4), slice(0, 4)), (4, 4, 4))
