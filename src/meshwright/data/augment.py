"""Augmentation that is exact when a sample is split: drawn from seed and index only, applied by global torch calls.

Every rank draws the same numbers, and `torch.flip` and arithmetic mean the whole tensor whether it is split or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STREAM = 0x61756731  # keeps these numbers apart from others drawn from the same seed
_DIM = {"depth": -3, "height": -2, "width": -1}


@dataclass(frozen=True)
class Augmentation:
    """What may be drawn: flips (each with probability ½) and image · scale + shift, uniform in 1 ± scale and 0 ± shift.

    Raises `ValueError` for an unknown dim and ranges outside of 0 ≤ scale < 1, 0 ≤ shift.
    """

    flip: tuple[str, ...] = ()
    scale: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        unknown = [dim for dim in self.flip if dim not in _DIM]
        if unknown:
            raise ValueError(f"flip: {unknown[0]!r} is no dim; choose from {', '.join(_DIM)}")
        if not 0 <= self.scale < 1 or self.shift < 0:
            raise ValueError(f"scale {self.scale} and shift {self.shift} must satisfy 0 <= scale < 1 and 0 <= shift")


@dataclass(frozen=True)
class Draw:
    """One augmentation. `flip` holds dims counted from the end, so they mean the same in image and label."""

    flip: tuple[int, ...]
    scale: float
    shift: float


def draw(config: Augmentation, seed: int, index: int) -> Draw:
    """The augmentation number `index` (such as the step): a pure function of its arguments, equal on all ranks."""
    generator = np.random.default_rng((_STREAM, seed, index))
    chances, (scale, shift) = generator.random(len(_DIM)), generator.uniform(-1, 1, 2)
    flip = tuple(
        dim for (name, dim), chance in zip(_DIM.items(), chances, strict=True) if name in config.flip and chance < 0.5
    )
    return Draw(flip, 1 + config.scale * float(scale), config.shift * float(shift))


def apply(drawn: Draw, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Augmented (image [N, C, D, H, W], label [N, D, H, W]), whole or split; the arguments stay as they are."""
    if drawn.flip:
        image, label = torch.flip(image, drawn.flip), torch.flip(label, drawn.flip)
    return image * drawn.scale + drawn.shift, label
