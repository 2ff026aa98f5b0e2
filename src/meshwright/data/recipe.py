"""What may be drawn for each sample, and what is drawn for the one at a place in the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.data import patches
from meshwright.data.chance import key, units
from meshwright.data.intensity import Gamma, Linear, Noise
from meshwright.data.monai_named import MonaiNamed
from meshwright.data.rearrange import Flip, Permute, Roll, rotate90
from meshwright.data.transforms import WORDS, Compose, Transform, see_dims
from meshwright.data.warp import Affine, Elastic
from meshwright.errors import DataError

_STREAM = 0x72637031  # keeps these numbers apart from others drawn from the same seed
_KINDS = ("affine", "elastic", "noise", "permute", "rotate90", "flip", "roll", "gamma", "linear", "sigma")

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Recipe:
    """Ranges of random numbers for 3-D samples; every one is off by default. Applied in this order:

    `rotate_deg`, `zoom`: turns about each axis within ± degrees, sizes × 1 / (1 + zoom) … 1 + zoom, about the middle of
    the patch; `elastic`: displacements up to so many voxels, control points `elastic_spacing` apart; both refuse to
    move a voxel further than `halo`. `patch`: a patch of that size. `permute`, `rotate90`: these dims change places or
    turn, by 90° · 0 … 3 in the plane of two of them. `flip`: each dim with probability ½. `roll`: these dims, by any
    number of voxels. `monai`: these, one after the other. `gamma`: exponents 1 / (1 + gamma) … 1 + gamma over
    `gamma_range`. `scale`, `shift`: image · (1 ± scale) ± shift. `noise`: normal noise of a standard deviation of
    0 … noise.

    Turns and zoom are of space in mm, elastic displacements in voxels. Raises `ValueError` for unknown dims and
    negative ranges.
    """

    rotate_deg: float = 0.0
    zoom: float = 0.0
    elastic: float = 0.0
    elastic_spacing: float = 32.0
    halo: float = 32.0
    patch: tuple[int, ...] | None = None
    permute: tuple[str, ...] = ()
    rotate90: tuple[str, ...] = ()
    flip: tuple[str, ...] = ()
    roll: tuple[str, ...] = ()
    gamma: float = 0.0
    gamma_range: tuple[float, float] = (0.0, 1.0)
    scale: float = 0.0
    shift: float = 0.0
    noise: float = 0.0
    monai: tuple[MonaiNamed, ...] = ()

    def __post_init__(self) -> None:
        for what in ("permute", "rotate90", "flip", "roll"):
            see_dims(getattr(self, what), what)
        for what in ("permute", "rotate90"):
            if len(getattr(self, what)) == 1:
                raise ValueError(f"{what} of {getattr(self, what)[0]}: two dims or three are needed")
        for what in ("rotate_deg", "zoom", "elastic", "gamma", "scale", "shift", "noise", "halo"):
            if not 0 <= getattr(self, what) < math.inf:
                raise ValueError(f"{what} {getattr(self, what)}: 0 or more is needed")
        if self.elastic:
            Elastic(self.elastic_spacing, self.elastic, 0)
        if self.gamma:
            Gamma(1.0, *self.gamma_range)

    @property
    def is_nothing(self) -> bool:
        """Whether samples stay as they are."""
        moves = (
            self.rotate_deg,
            self.zoom,
            self.elastic,
            self.patch,
            self.permute,
            self.rotate90,
            self.flip,
            self.roll,
        )
        return not any((*moves, self.gamma, self.scale, self.shift, self.noise, self.monai))

    @property
    def fixed(self) -> Compose:
        """What belongs to the data and not to chance: for held-out samples too."""
        return Compose(tuple(step for step in self.monai if not step.is_random))

    def draw(
        self,
        seed: int,
        position: int,
        shape: Sequence[int],
        boxes: Sequence[Sequence[slice]] = (),
        share: float = 0.0,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> Compose:
        """The augmentation of the sample at `position` in the order: a function of its arguments, equal on all ranks.

        `shape`: D, H, W of the sample; `spacing_mm`: the size of its voxels, likewise; `boxes` and `share` as in
        `patches.draw`. What is drawn for one thing does not depend on whether another is switched on. Raises
        `DataError` for a patch larger than the sample, and for dims of different sizes that would have to change
        places.
        """
        patch = patches.draw(shape, self.patch, seed, position, boxes, share) if self.patch is not None else None
        sizes = self._sizes(tuple(shape) if patch is None else patch.size)
        chance = {kind: units(key(_STREAM, seed, position, number), 5) for number, kind in enumerate(_KINDS)}
        found: list[Transform] = []
        if self.rotate_deg or self.zoom:
            angles = [math.radians(self.rotate_deg) * _signed(at) for at in chance["affine"][:3]]
            zoom = (1 + self.zoom) ** _signed(chance["affine"][3])
            middle = None
            if patch is not None:
                middle = tuple(lo + (size - 1) / 2 for lo, size in zip(patch.start, patch.size, strict=True))
            found.append(Affine(in_voxels(turned(angles, zoom), spacing_mm), centre=middle, halo=self.halo))
        if self.elastic:
            found.append(Elastic(self.elastic_spacing, self.elastic, key(_STREAM, seed, position, 101), self.halo))
        found += [patch] if patch is not None else []
        if self.permute:
            found.append(Permute(_shuffled(self.permute, chance["permute"])))
        if self.rotate90:
            first, second, *_ = _ordered(self.rotate90, chance["rotate90"])
            found.append(rotate90((first, second), int(chance["rotate90"][4] * 4)))
        if self.flip:
            flips = [word for word, at in zip(WORDS, chance["flip"], strict=False) if word in self.flip and at < 0.5]
            found.append(Flip(tuple(flips)))
        if self.roll:
            at = dict(zip(WORDS, chance["roll"], strict=False))
            found.append(Roll(self.roll, tuple(int(at[word] * sizes[word]) for word in self.roll)))
        found += [step.at(key(_STREAM, seed, position, 200 + number)) for number, step in enumerate(self.monai)]
        if self.gamma:
            found.append(Gamma((1 + self.gamma) ** _signed(chance["gamma"][0]), *self.gamma_range))
        if self.scale or self.shift:
            scale, shift = (_signed(at) for at in chance["linear"][:2])
            found.append(Linear(1 + self.scale * scale, self.shift * shift))
        if self.noise:
            found.append(Noise(self.noise * chance["sigma"][0], key(_STREAM, seed, position, 102)))
        return Compose(tuple(found))

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The size of each dim where dims turn; refuses at the first sample what only some draws would show."""
        if len(shape) != len(WORDS):
            raise DataError(f"augmentation is drawn for samples with D, H, W; this one has shape {shape}")
        sizes = dict(zip(WORDS, shape, strict=True))
        for what, words in (("permute", self.permute), ("rotate90", self.rotate90)):
            if len({sizes[word] for word in words}) > 1:
                given = ", ".join(f"{word} {sizes[word]}" for word in words)
                raise DataError(f"{what} needs dims of one size, not {given}: name others, or take a cubic patch")
        return sizes


def turned(angles: Sequence[float], zoom: float) -> Matrix:
    """Output position → input position: turns about D, H and W, one after the other, and a magnification by `zoom`."""
    total: list[list[float]] = [[float(i == j) / zoom for j in range(3)] for i in range(3)]
    for axis, angle in enumerate(angles):
        a, b = (i for i in range(3) if i != axis)
        cos, sin = math.cos(angle), math.sin(angle)
        for row in total:
            row[a], row[b] = row[a] * cos + row[b] * sin, row[b] * cos - row[a] * sin
    return tuple(tuple(row) for row in total)


def in_voxels(matrix: Matrix, spacing_mm: Sequence[float]) -> Matrix:
    """The map of positions in voxels that is `matrix` in mm; the same where voxels are cubes.

    Raises `DataError` for voxels without a size.
    """
    if not all(0 < size < math.inf for size in spacing_mm):
        raise DataError(f"voxels of {tuple(spacing_mm)} mm (D, H, W): turns need sizes above 0; correct the header")
    rows = zip(matrix, spacing_mm, strict=True)
    return tuple(tuple(number * (own / out) for number, own in zip(row, spacing_mm, strict=True)) for row, out in rows)


def _signed(at: float) -> float:
    """From [0, 1) to [-1, 1)."""
    return 2 * at - 1


def _ordered(words: tuple[str, ...], chance: Sequence[float]) -> list[str]:
    """`words` in a random order."""
    return [word for _, word in sorted(zip(chance, words, strict=False))]


def _shuffled(words: tuple[str, ...], chance: Sequence[float]) -> tuple[str, ...]:
    """All dims, those of `words` in a random order in each other's places."""
    turn = dict(zip(sorted(words, key=WORDS.index), _ordered(words, chance), strict=True))
    return tuple(turn.get(word, word) for word in WORDS)
