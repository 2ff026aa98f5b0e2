"""Augmentations of the values of images: each voxel by itself, with the same bits wherever the sample is cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.data.transforms import Box, Fields, Shape
from meshwright.errors import DataError
from meshwright.parallel import noise
from meshwright.plan.geometry import Interval

_BLOCK = 1 << 14  # elements computed at once


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every element, bit for bit the same wherever in a tensor the element is.

    Torch computes powers of whole vector registers with one algorithm and of the remainder with another, which differs
    in the last bit; logarithms and cosines may. So `x` is laid out in blocks that have no remainder and that torch does
    not share out among threads. Sums, products and quotients need none of this: IEEE 754 rounds them alike everywhere.
    """
    flat = x.contiguous().view(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 64), value=1)
    blocks = [function(block) for block in padded.split(_BLOCK)]
    return torch.cat(blocks)[: flat.numel()].view(x.shape) if blocks else function(x)


class PerVoxel:
    """The geometry of a transform that needs just the box it makes."""

    fields: tuple[str, ...] | None

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def sources(self, box: Box, shape: Shape) -> tuple[Box, ...]:
        return (box,)

    def build(self, parts: Sequence[Fields], box: Box, shape: Shape) -> dict[str, Tensor]:
        part = dict(parts[0])
        chosen = self.fields
        if chosen is None:
            chosen = tuple(name for name, x in part.items() if x.is_floating_point())
        for name in chosen:
            if name not in part:
                raise DataError(f"{type(self).__name__}: the sample has no volume {name!r}, only {', '.join(part)}")
            part[name] = self._values(name, part[name], box, shape)
        return part

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(PerVoxel):
    """x · scale + shift. `fields` None: all images (spatial fields of floating point)."""

    scale: float = 1.0
    shift: float = 0.0
    fields: tuple[str, ...] | None = None

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        return x * self.scale + self.shift


@dataclass(frozen=True)
class Gamma(PerVoxel):
    """low + (high − low) · ((x − low) / (high − low)) ^ gamma; x below `low` counts as `low`.

    The range is given, not measured: the extremes of a part are not those of the sample. `fields` as in `Linear`.
    """

    gamma: float
    low: float = 0.0
    high: float = 1.0
    fields: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.gamma > 0 or not self.low < self.high:
            raise ValueError(f"gamma {self.gamma} of {self.low} … {self.high}: gamma > 0 and low < high are needed")

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        unit = ((x - self.low) / (self.high - self.low)).clamp(min=0)
        return elementwise(lambda block: block.pow(self.gamma), unit) * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Noise(PerVoxel):
    """x + sigma · a standard normal number that depends on `key`, the field's name and the global position only.

    The position includes the channel. Box and Muller on SplitMix64 (`parallel.noise`), computed in fp64 and rounded to
    the type of the field. `fields` as in `Linear`.
    """

    sigma: float
    key: int
    fields: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise ValueError(f"sigma {self.sigma}: 0 or more is needed")

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        lead = tuple(x.shape[: x.ndim - len(shape)])
        here = (*(Interval(0, size) for size in lead), *box)
        key = noise.mix(noise.mix(self.key) ^ zlib.crc32(name.encode()))
        drawn = noise.fill(
            torch.empty_like(x, memory_format=torch.contiguous_format),
            key,
            (*lead, *shape),
            here,
            lambda bits, _: elementwise(noise.normal, bits),
        )
        return x + drawn * self.sigma
