"""Random samples, cuts and transforms for the laws of augmentation, and a reader that keeps watch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from meshwright.data.intensity import Gamma, Linear, Noise
from meshwright.data.rearrange import Crop, Flip, Permute, Roll, rotate90
from meshwright.data.transforms import WORDS, Compose, Fields, Shape, Transform
from meshwright.data.warp import Affine, Elastic

ANYWHERE = 1e9  # a halo that nothing leaves


def sample(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Two images, a label and a vector; no two voxels of an image are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(2, *shape, generator=generator),
        "second": torch.rand(1, *shape, generator=generator, dtype=torch.float64),
        "label": torch.randint(0, 200, shape, generator=generator, dtype=torch.uint8),
        "vector": torch.randn(2, generator=generator),
    }


class Reading:
    """Reads boxes of a sample in memory, and only what is inside of it; counts voxels."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.shape = tuple(fields["label"].shape)
        self.voxels = 0

    def __call__(self, box: Sequence[slice]) -> Fields:
        for span, size in zip(box, self.shape, strict=True):
            assert 0 <= span.start <= span.stop <= size, (box, self.shape)
        self.voxels += math.prod(span.stop - span.start for span in box)
        cut = (..., *box)
        return {
            name: field if name == "vector" else field[cut].clone(memory_format=torch.contiguous_format)
            for name, field in self.fields.items()
        }


def words(rank: int) -> tuple[str, ...]:
    return WORDS[-rank:]


def some(rank: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(words(rank)), min_size=1, max_size=rank, unique=True).map(tuple)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


FILLS = st.sampled_from((None, 0.0, -1.5))


@st.composite
def flips(draw: st.DrawFn, shape: Shape) -> Transform:
    return Flip(draw(some(len(shape))))


@st.composite
def rolls(draw: st.DrawFn, shape: Shape) -> Transform:
    dims = draw(some(len(shape)))
    return Roll(dims, tuple(draw(st.integers(-20, 20)) for _ in dims))


@st.composite
def permutations(draw: st.DrawFn, shape: Shape) -> Transform:
    order = draw(st.permutations(range(len(shape))))
    if any(shape[i] != shape[j] for i, j in enumerate(order)):
        order = list(range(len(shape)))
    return Permute(tuple(words(len(shape))[i] for i in order))


@st.composite
def rotations(draw: st.DrawFn, shape: Shape) -> Transform:
    if len(shape) == 1:
        return Compose()
    a, b = draw(st.permutations(range(len(shape))))[:2]
    names = words(len(shape))
    times = draw(st.integers(-3, 4)) if shape[a] == shape[b] else 2
    return rotate90((names[a], names[b]), times, len(shape))


@st.composite
def crops(draw: st.DrawFn, shape: Shape) -> Transform:
    size = tuple(draw(st.integers(max(1, n - 4), n)) for n in shape)
    return Crop(tuple(draw(st.integers(0, n - m)) for n, m in zip(shape, size, strict=True)), size)


@st.composite
def affines(draw: st.DrawFn, shape: Shape) -> Transform:
    rank = len(shape)
    matrix = tuple(tuple((i == j) + draw(numbers(-0.4, 0.4)) for j in range(rank)) for i in range(rank))
    shift = tuple(draw(numbers(-3, 3)) for _ in shape)
    return Affine(matrix, shift, None, ANYWHERE, draw(FILLS), 7, draw(st.sampled_from(((), ("second",)))))


@st.composite
def elastics(draw: st.DrawFn, shape: Shape) -> Transform:
    spacing = draw(numbers(1, 8))
    return Elastic(spacing, draw(numbers(0, 0.39)) * spacing, draw(st.integers(0, 2**62)), ANYWHERE, draw(FILLS), 7)


@st.composite
def linears(draw: st.DrawFn, shape: Shape) -> Transform:
    return Linear(draw(numbers(-2, 2)), draw(numbers(-2, 2)), draw(st.sampled_from((None, ("second",)))))


@st.composite
def gammas(draw: st.DrawFn, shape: Shape) -> Transform:
    return Gamma(draw(numbers(0.25, 4)), -2.0, draw(numbers(1, 3)))


@st.composite
def noises(draw: st.DrawFn, shape: Shape) -> Transform:
    return Noise(draw(numbers(0, 2)), draw(st.integers(0, 2**62)))


KINDS = {
    "flip": flips,
    "roll": rolls,
    "permute": permutations,
    "rotate90": rotations,
    "crop": crops,
    "affine": affines,
    "elastic": elastics,
    "linear": linears,
    "gamma": gammas,
    "noise": noises,
}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """1 to 3 dims of uneven sizes; often two or all alike, so that dims can be exchanged."""
    rank = draw(st.integers(1, 3))
    few = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    return tuple(draw(st.sampled_from(few)) for _ in range(rank))


@st.composite
def chains(draw: st.DrawFn, shape: Shape, most: int = 4) -> Compose:
    """Up to `most` transforms of any kind, each drawn for the shape that the ones before it leave."""
    steps: list[Transform] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(sorted(KINDS)))
        steps.append(draw(KINDS[kind](shape)))
        shape = steps[-1].output_shape(shape)
    return Compose(tuple(steps))
