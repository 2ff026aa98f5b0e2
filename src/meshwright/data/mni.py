"""The main job's data: the MNI152 T1 template and its tissue maps, which the package `nilearn` carries.

Three classes from T1: labels = argmax of (1 − grey − white, grey, white). The template is mirror-symmetric to the bit,
so its other hemisphere is no hold-out. It is cut across instead: fold 0 trains on the first 60 % of the coronal
planes and validates on the last 32 % as a volume of its own; fold 1 the other way round. Between them lies a gap, so no
training voxel enters a prediction.

Template: Fonov et al., "Unbiased average age-appropriate brain templates from birth to adulthood", NeuroImage 47, 2009.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from meshwright.data.arrays import Array
from meshwright.data.nifti import Volume, open_volume, see_matching
from meshwright.data.planes import Planes, prepare
from meshwright.data.source import IMAGE, LABEL, Field, Part, kept
from meshwright.errors import DataError

CLASSES = ("other", "grey", "white")
TRAIN_FRACTION, VALIDATE_FRACTION = 0.60, 0.32
# The brain with a few empty voxels around it, in mm of the file (D, H, W); what lies outside is zero in all files.
# Sizes are multiples of 16, so that at 1, 2 and 4 mm a three-level network halves every one of them twice.
_BRAIN = {
    ("train", 0): (slice(0, 160), slice(27, 139), slice(18, 178)),
    ("validate", 0): (slice(0, 160), slice(159, 223), slice(18, 178)),
    ("train", 1): (slice(0, 160), slice(94, 222), slice(18, 178)),
    ("validate", 1): (slice(0, 160), slice(10, 74), slice(18, 178)),
}
_MIDDLE = 98  # the first plane of x that does not belong to the left hemisphere
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_FULL = 255  # a probability of 1 in the tissue maps
# Intensities become (value − _CENTRE) / _SPREAD. Constants, so that no statistic of a part can depend on the plan.
_CENTRE, _SPREAD = 128.0, 64.0


def _folder() -> Path:
    """Where nilearn keeps the files; nilearn itself is not imported, which would take seconds."""
    found = importlib.util.find_spec("nilearn")
    if found is None or not found.submodule_search_locations:
        raise DataError("the example volume is part of the package nilearn: pip install 'meshwright[examples]'")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


@dataclass(frozen=True)
class Template:
    """Three NIfTI files on one grid: T1, grey and white matter, all in whole numbers, the maps from 0 to 255."""

    t1: Volume
    grey: Volume
    white: Volume

    @classmethod
    def open(cls, folder: Path | None = None) -> Template:
        """Check the three headers. Raises `DataError` for what is missing, damaged or does not match."""
        folder = folder or _folder()
        template = cls(*(open_volume(folder / _FILE.format(kind)) for kind in ("t1", "gm", "wm")))
        see_matching(template.t1, template.grey, template.white)
        for volume in (template.t1, template.grey, template.white):
            if volume.dtype != np.uint8 or (volume.slope, volume.inter) != (1.0, 0.0):
                raise DataError(f"{volume.path}: {volume.dtype} values with a scale; plain uint8 is expected")
        return template


@dataclass(frozen=True)
class MniPart:
    """One volume of the task, a `VolumeSource` with one sample: blocks of `resolution_mm`³ voxels inside `box`.

    Image and tissue maps of a block are the means of its voxels, its label the argmax of the mean maps. The sums are
    whole numbers and blocks never depend on who reads them, so a part has the bits of the same part of the whole.
    """

    template: Template
    name: str
    box: tuple[slice, slice, slice]  # D, H, W in voxels of the files
    resolution_mm: int = 2

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"image": IMAGE, "label": LABEL}

    def shape(self, index: int = 0) -> tuple[int, int, int]:
        """D, H, W in blocks; voxels that fill no whole block at the end are left out."""
        d, h, w = ((span.stop - span.start) // self.resolution_mm for span in self.box)
        return d, h, w

    def spacing_mm(self, index: int = 0) -> tuple[float, float, float]:
        d, h, w = (size * self.resolution_mm for size in self.template.t1.spacing_mm)
        return d, h, w

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` (in blocks) as image [1, 1, d, h, w] float32 and label [1, d, h, w] uint8.

        Raises `DataError` for a box outside of the volume and for damaged files.
        """
        if any(span.start < 0 or span.stop > size for span, size in zip(spans, self.shape(), strict=True)):
            raise DataError(f"{self.name}: the box {tuple(spans)} is no part of shape {self.shape()} (D, H, W)")
        factor = self.resolution_mm
        fine = tuple(
            slice(box.start + span.start * factor, box.start + span.stop * factor)
            for box, span in zip(self.box, spans, strict=True)
        )
        files = [Planes(volume, fine) for volume in (self.template.t1, self.template.grey, self.template.white)]
        prepare(files)
        d, h, w = (span.stop - span.start for span in spans)
        image = np.empty((d, h, w), np.float32)
        label = np.empty((d, h, w), np.uint8)
        full = _FULL * factor**3
        for z, (t1, grey, white) in enumerate(zip(*(_block_sums(planes, factor) for planes in files), strict=True)):
            image[z] = (t1 / factor**3 - _CENTRE) / _SPREAD  # in float64, rounded once
            label[z] = np.stack((full - grey - white, grey, white)).argmax(axis=0)
        volume = self.template.t1
        plane_bytes = (fine[1].stop - fine[1].start) * volume.shape[2] * volume.dtype.itemsize
        return kept(
            {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)},
            read_bytes=sum(planes.decoded_bytes for planes in files),
            ideal_read_bytes=sum(planes.box_bytes for planes in files),
            shared_bytes=sum(planes.shared_bytes for planes in files),
            transient_bytes=len(files) * plane_bytes + 8 * 8 * h * w,  # planes of the files; sums in 64 bit
        )


def _block_sums(planes: Planes, factor: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Sums over factor³ voxels, one plane [h, w] of blocks at a time."""
    total: Array = np.zeros(0, np.int64)
    for index, plane in enumerate(planes):
        h, w = plane.shape
        sums = plane.reshape(h // factor, factor, w // factor, factor).sum(axis=(1, 3), dtype=np.int64)
        total = sums if index % factor == 0 else total + sums
        if index % factor == factor - 1:
            yield total


def _box(part: str, fold: int, crop: bool, shape: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    if crop:
        return _BRAIN[part, fold]
    planes = shape[1]
    count = int((TRAIN_FRACTION if part == "train" else VALIDATE_FRACTION) * planes)
    first = (part == "train") == (fold == 0)
    coronal = slice(0, count) if first else slice(planes - count, planes)
    return slice(0, shape[0]), coronal, slice(0, shape[2])


def open_mni(
    fold: int = 0,
    resolution_mm: int = 2,
    hemisphere: Literal["both", "left"] = "both",
    crop: bool = True,
) -> tuple[MniPart, MniPart]:
    """(train, validate) of the main job's task. Opens and checks the files, reads no data.

    `resolution_mm` 1 to 4 is the edge of a block; `hemisphere` left keeps x < 98 voxels; `crop` keeps the box around
    the brain instead of all planes. Raises `DataError`.
    """
    if fold not in (0, 1):
        raise DataError(f"data.fold is {fold}; there are folds 0 and 1")
    if resolution_mm not in (1, 2, 3, 4):
        raise DataError(f"data.resolution_mm is {resolution_mm}; choose 1, 2, 3 or 4")
    if hemisphere not in ("both", "left"):
        raise DataError(f"data.hemisphere is {hemisphere!r}; choose 'both' or 'left'")
    template = Template.open()

    def part(kind: str) -> MniPart:
        depth, height, width = _box(kind, fold, crop, template.t1.shape)
        if hemisphere == "left":
            width = slice(width.start, _MIDDLE)
        return MniPart(template, f"MNI152 {kind}", (depth, height, width), resolution_mm)

    return part("train"), part("validate")
