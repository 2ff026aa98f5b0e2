"""A liver-and-tumour-like phantom: volumes with labels, of any size, that depend on a seed alone.

A body of soft tissue holds a liver, a spleen of the *same* brightness on the other side, a stomach, two kidneys, a
spine, and lungs above; the liver holds one to five darker tumours, the spleen and the kidneys as dark cysts that are
no tumours. So brightness alone decides nothing: a network has to see where it is, which a small sub-volume does not
show. All shapes are given in fractions of the volume, so the same patient exists at every size.

Labels: 0 background, 1 liver, 2 tumour. Brightness is like that of computed tomography (Hounsfield units, int16), with
a smooth unevenness of 10 and noise of 25 units.

An organ is the set where |A (x - c)| < 1 + Σ a_i cos(k_i · x + p_i): an ellipsoid with a wavy surface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CLASSES = ("background", "liver", "tumour")
AIR, LUNG, TISSUE, ORGAN, DARK, STOMACH, KIDNEY, BONE = -1000, -800, 20, 110, 60, 40, 170, 450
UNEVEN, NOISE = 10.0, 25.0  # brightness: of the smooth unevenness, and the standard deviation of the noise
WAVES = 4  # that bend a surface
_SHAPES, _UNEVEN, _NOISE = range(3)  # streams of random numbers of a volume


@dataclass(frozen=True)
class Organ:
    """A wavy ellipsoid. `centre` and `radii` along depth, height, width; waves [WAVES, 3], heights and phases
    [WAVES]."""

    centre: Array
    radii: Array
    waves: Array
    heights: Array
    phases: Array

    def inside(self, grid: tuple[Array, Array, Array]) -> Array:
        """Which points of an open grid (three arrays that broadcast) lie inside."""
        square = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, self.centre, self.radii, strict=True))
        bound = 1 + sum(
            height * np.cos(sum(k * x for k, x in zip(wave, grid, strict=True)) + phase)
            for wave, height, phase in zip(self.waves, self.heights, self.phases, strict=True)
        )
        return np.asarray(square < bound * bound)


@dataclass(frozen=True)
class Patient:
    """The organs of one volume, painted in this order: (organ, brightness, label)."""

    painted: tuple[tuple[Organ, int, int], ...]


def _random(seed: int, index: int, stream: int, place: int = 0) -> np.random.Generator:
    """Random numbers of one purpose: a function of its arguments, whatever was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index, stream, place))))


def _organ(draw: np.random.Generator, centre: Any, radii: Any, wavy: float = 0.06, moved: float = 0.02) -> Organ:
    """An organ near `centre`, its radii within 10 %."""
    return Organ(
        np.asarray(centre) + draw.uniform(-moved, moved, 3),
        np.asarray(radii) * draw.uniform(0.9, 1.1, 3),
        draw.normal(0.0, 12.0, (WAVES, 3)),
        draw.uniform(0.0, wavy, WAVES),
        draw.uniform(0.0, 2 * np.pi, WAVES),
    )


def _spots(draw: np.random.Generator, within: Organ, count: int, size: tuple[float, float]) -> list[Organ]:
    """Small round things in the inner part of an organ."""
    found = []
    for _ in range(count):
        direction = draw.normal(size=3)
        at = within.centre + within.radii * direction / np.linalg.norm(direction) * draw.uniform(0.0, 0.6)
        found.append(_organ(draw, at, np.full(3, draw.uniform(*size)), 0.08, 0.0))
    return found


def patient(seed: int, index: int) -> Patient:
    """The patient of a seed and a number."""
    draw = _random(seed, index, _SHAPES)
    body = _organ(draw, (0.5, 0.5, 0.5), (0.9, 0.40, 0.45), 0.02, 0.01)
    lungs = [_organ(draw, (0.08, 0.48, 0.5 + side * 0.2), (0.22, 0.24, 0.15)) for side in (-1, 1)]
    liver = _organ(draw, (0.50, 0.44, 0.34), (0.26, 0.22, 0.22))
    spleen = _organ(draw, (0.46, 0.55, 0.77), (0.16, 0.14, 0.10))
    stomach = _organ(draw, (0.45, 0.36, 0.64), (0.16, 0.12, 0.12))
    kidneys = [_organ(draw, (0.70, 0.66, 0.5 + side * 0.22), (0.14, 0.08, 0.07)) for side in (-1, 1)]
    spine = _organ(draw, (0.5, 0.80, 0.5), (2.0, 0.07, 0.07), 0.04, 0.01)
    tumours = _spots(draw, liver, int(draw.integers(1, 6)), (0.03, 0.08))
    cysts = _spots(draw, spleen, int(draw.integers(1, 4)), (0.03, 0.05))
    cysts += [cyst for kidney in kidneys for cyst in _spots(draw, kidney, int(draw.integers(0, 3)), (0.02, 0.04))]
    painted = [(body, TISSUE, 0), (spine, BONE, 0), (stomach, STOMACH, 0), (spleen, ORGAN, 0)]
    painted += [(kidney, KIDNEY, 0) for kidney in kidneys] + [(cyst, DARK, 0) for cyst in cysts]
    painted += [(liver, ORGAN, 1)] + [(tumour, DARK, 2) for tumour in tumours] + [(lung, LUNG, 0) for lung in lungs]
    return Patient(tuple(painted))


def planes(seed: int, index: int, size: int, first: int, last: int) -> tuple[Array, Array]:
    """(image int16, label uint8) of the planes [first, last) of a cube of `size`: [last - first, size, size] each.

    The same for every way to cut the volume into planes.
    """
    axis = (np.arange(size) + 0.5) / size
    grid = axis[first:last, None, None], axis[None, :, None], axis[None, None, :]
    image = np.full((last - first, size, size), float(AIR))
    label = np.zeros(image.shape, np.uint8)
    for number, (organ, brightness, kind) in enumerate(patient(seed, index).painted):
        mask = organ.inside(grid)
        if kind == 2:
            mask &= label > 0  # tumours end where the liver ends
        elif number:
            mask &= image > AIR  # everything lies within the body
        image[mask], label[mask] = brightness, kind
    draw = _random(seed, index, _UNEVEN)
    waves, phases = draw.normal(0.0, 6.0, (WAVES, 3)), draw.uniform(0.0, 2 * np.pi, WAVES)
    for wave, phase in zip(waves, phases, strict=True):
        image += UNEVEN / WAVES * np.cos(sum(k * x for k, x in zip(wave, grid, strict=True)) + phase)
    for plane in range(first, last):
        image[plane - first] += _random(seed, index, _NOISE, plane).normal(0.0, NOISE, (size, size))
    return np.rint(image).astype(np.int16), label
