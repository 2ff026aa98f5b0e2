"""MONAI array transforms that change each voxel by itself, as transforms of split samples; others are refused by name.

MONAI itself is not imported here: whoever has one of its transforms has it already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshwright.data.intensity import PerVoxel
from meshwright.data.transforms import Box, Compose, Shape
from meshwright.errors import DataError

_POINTWISE = (
    "CastToType",
    "Identity",
    "MapLabelValue",
    "NormalizeIntensity",
    "ScaleIntensity",
    "ScaleIntensityRange",
    "ShiftIntensity",
    "SignalFillEmpty",
    "ThresholdIntensity",
)
_MEASURING = (
    "AdjustContrast",
    "ClipIntensityPercentiles",
    "ForegroundMask",
    "HistogramNormalize",
    "ScaleIntensityFixedMean",
    "ScaleIntensityRangePercentiles",
    "StdShiftIntensity",
)
_MEASURES = "measures the array it is given, and a rank holds only its part of the sample"


@dataclass(frozen=True)
class Monai(PerVoxel):
    """One transform of the list above applied to `fields` (None: all images), each [c, d, h, w] or [d, h, w]."""

    transform: Callable[[Tensor], Any]
    fields: tuple[str, ...] | None = None

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        found = self.transform(x.clone(memory_format=torch.contiguous_format))  # some of them write into what they get
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        found = found.as_tensor() if hasattr(found, "as_tensor") else found
        if tuple(found.shape) != tuple(x.shape):
            raise DataError(f"{type(self.transform).__name__} made {tuple(found.shape)} of {name} {tuple(x.shape)}")
        return found


def monai(*transforms: Any, fields: tuple[str, ...] | None = None) -> Compose:
    """MONAI array transforms (a `monai.transforms.Compose` of them too) for the named fields; None: all images.

    Accepted are CastToType, Identity, MapLabelValue, ScaleIntensityRange, ShiftIntensity, SignalFillEmpty,
    ThresholdIntensity, NormalizeIntensity with subtrahend and divisor given, and ScaleIntensity by a factor. Raises
    `DataError` with the reason for every other one, subclasses of these included.
    """
    steps = []
    for transform in _flat(transforms):
        reason = refused(transform)
        if reason:
            raise DataError(f"{type(transform).__name__} cannot augment a split sample: it {reason}")
        steps.append(Monai(transform, fields))
    return Compose(tuple(steps))


def _flat(transforms: tuple[Any, ...]) -> Iterator[Any]:
    for transform in transforms:
        if _from_monai(type(transform)) and type(transform).__name__ == "Compose":
            yield from _flat(tuple(transform.transforms))
        else:
            yield transform


def _from_monai(kind: type) -> bool:
    return kind.__module__.startswith("monai.transforms.")


def refused(transform: Any) -> str | None:
    """Why a transform is refused; None if it is accepted."""
    kind = type(transform)
    if not _from_monai(kind):
        return "is no transform of MONAI, so nothing says that it changes each voxel by itself"
    if kind.__name__ in _POINTWISE:
        return _measured(kind.__name__, transform)
    return f"{not_pointwise(kind)} (accepted are {', '.join(_POINTWISE)})"


def not_pointwise(kind: type) -> str:
    """Why transforms of this class of MONAI, which is none of the list above, are refused."""
    if any(base.__name__ == "Randomizable" for base in kind.__mro__):
        return "draws from a generator of its own; Noise, Flip and the others draw from seed and position alone"
    if any(base.__name__ == "MapTransform" for base in kind.__mro__):
        return "works on a dictionary; name the array transform"
    if kind.__name__ in _MEASURING:
        return _MEASURES
    if kind.__module__.startswith(("monai.transforms.spatial", "monai.transforms.croppad")):
        return "moves voxels between ranks; use Flip, Permute, rotate90, Roll, Crop, Affine or Elastic"
    return "is not known to change each voxel by itself"


def _measured(name: str, transform: Any) -> str | None:
    if name == "ScaleIntensity" and (transform.minv is not None or transform.maxv is not None):
        return f"{_MEASURES}: give a factor with minv=None and maxv=None, or use ScaleIntensityRange"
    if name == "NormalizeIntensity":
        for given in (transform.subtrahend, transform.divisor):
            several = transform.channel_wise and isinstance(given, Iterable)
            numbers = list(given) if several else [None if transform.channel_wise else given]
            if not all(isinstance(number, Real) for number in numbers):
                return f"{_MEASURES}: give subtrahend and divisor as numbers, one a channel if channel_wise"
    return None
