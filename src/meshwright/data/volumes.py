"""A user's own NIfTI files: pairs of image and label on one grid."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from meshwright.data.arrays import Array
from meshwright.data.nifti import Volume, open_volume, see_matching
from meshwright.data.planes import Planes, read_box
from meshwright.data.source import IMAGE, LABEL, Field, Part, kept
from meshwright.errors import DataError


@dataclass(frozen=True)
class Pair:
    """An image and its label, of which the headers have been read and compared."""

    image: Volume
    label: Volume


@dataclass(frozen=True)
class NiftiPairs:
    """A `VolumeSource` over pairs. `classes` names the label values 0, 1, 2 … that may occur.

    Intensities become (value − centre) / spread. With `intensity` these two numbers are given; without, they are mean
    and standard deviation of the image's voxels that are not 0, from one pass over the whole file in its own order,
    so equal on every rank whatever the plan (and counted in `read_bytes`).
    """

    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    intensity: tuple[float, float] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(pair.image.path.name for pair in self.pairs)

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"image": IMAGE, "label": LABEL}

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.pairs[index].image.shape

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self.pairs[index].image.spacing_mm

    @cached_property
    def _measured(self) -> dict[int, tuple[float, float]]:
        return {}

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` of pair `index`: image [1, 1, d, h, w] float32, label [1, d, h, w] uint8.

        Raises `DataError` for damaged files, a box outside of the volume, labels that are no class number and an
        image without two different values.
        """
        pair, scanned_bytes = self.pairs[index], 0
        if self.intensity is not None:
            centre, spread = self.intensity
        else:
            if index not in self._measured:
                self._measured[index] = intensity(pair.image)
                scanned_bytes = pair.image.offset_bytes + pair.image.data_bytes
            centre, spread = self._measured[index]
        image, image_bytes = read_box(pair.image, spans)
        image -= np.float32(centre)
        image /= np.float32(spread)
        planes = Planes(pair.label, spans)
        label = np.empty(planes.shape, np.uint8)
        for z, plane in enumerate(planes):
            label[z] = self._class_numbers(pair.label, plane)
        _, h, w = pair.image.shape
        plane_bytes = h * w * max(pair.image.dtype.itemsize, pair.label.dtype.itemsize)
        return kept(
            {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)},
            read_bytes=scanned_bytes + image_bytes + planes.decoded_bytes,
            ideal_read_bytes=math.prod(planes.shape) * pair.image.dtype.itemsize + planes.box_bytes,
            transient_bytes=plane_bytes + 12 * h * w,  # a stored plane, its values in float64 and float32
        )

    def _class_numbers(self, label: Volume, raw: Array) -> Array:
        values = label.scale(raw)
        wrong = values[~((values >= 0) & (values < len(self.classes)) & (values == np.floor(values)))]
        if wrong.size:
            raise DataError(
                f"{label.path}: label value {wrong[0]:g}; whole numbers from 0 to {len(self.classes) - 1} are expected "
                f"for the {len(self.classes)} classes {', '.join(self.classes)}"
            )
        return values.astype(np.uint8)


def intensity(volume: Volume) -> tuple[float, float]:
    """(mean, standard deviation) of the values that are not 0, in one pass over the file, plane by plane.

    The means of planes are merged stably: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
    Raises `DataError` for infinities, NaN, and an image in which all these values are equal.
    """
    count, mean, squares = 0, 0.0, 0.0
    for raw in Planes(volume, tuple(slice(0, size) for size in volume.shape)):
        plane = volume.scale(raw).astype(np.float64)
        if not np.isfinite(plane).all():
            raise DataError(f"{volume.path}: contains NaN or infinity; replace these voxels before training")
        values = plane[plane != 0]
        if not values.size:
            continue
        shift = values.mean() - mean
        total = count + values.size
        mean += shift * values.size / total
        squares += values.var() * values.size + shift**2 * count * values.size / total
        count = total
    if squares <= 0:
        raise DataError(f"{volume.path}: no two different values other than 0; is this the image?")
    return float(mean), math.sqrt(squares / count)


def open_pairs(
    images: str,
    labels: str,
    classes: Sequence[str],
    intensity: tuple[float, float] | None = None,
) -> NiftiPairs:
    """Pairs from two file patterns such as "scans/*_t1.nii.gz", in order of their names; headers are compared.

    Raises `DataError` when a pattern finds nothing, when the counts differ, for more than 255 classes, and for any file
    that is damaged or does not match its partner.
    """
    if not 2 <= len(classes) <= 255:
        raise DataError(f"data.classes names {len(classes)} classes; 2 to 255 are possible")
    if intensity is not None and not intensity[1] > 0:
        raise DataError(f"data.intensity is {list(intensity)}; the second number, the spread, must be above 0")
    found = {
        key: sorted(glob.glob(pattern, recursive=True)) for key, pattern in (("images", images), ("labels", labels))
    }
    for key, pattern in (("images", images), ("labels", labels)):
        if not found[key]:
            raise DataError(f"data.{key}: no file matches {pattern!r}")
    if len(found["images"]) != len(found["labels"]):
        raise DataError(
            f"data.images {images!r} finds {len(found['images'])} files but data.labels {labels!r} finds "
            f"{len(found['labels'])}; each image needs one label, and sorted by name they must correspond"
        )
    pairs = []
    for image_path, label_path in zip(found["images"], found["labels"], strict=True):
        pair = Pair(open_volume(image_path), open_volume(label_path))
        see_matching(pair.image, pair.label)
        pairs.append(pair)
    return NiftiPairs(tuple(pairs), tuple(classes), intensity)


def hold_out(source: NiftiPairs, fraction: float = 0.2) -> tuple[NiftiPairs, NiftiPairs]:
    """(train, validate): the last `fraction` of the pairs, at least one, is held out.

    Raises `DataError` below 2 pairs.
    """
    count = len(source.pairs)
    held = max(1, round(fraction * count))
    if held >= count:
        raise DataError(
            f"{count} pair(s), {held} of them held out, leave nothing to train on; "
            "give more files, or name data.validation_images and data.validation_labels"
        )
    train, validate = source.pairs[:-held], source.pairs[-held:]
    return (
        NiftiPairs(train, source.classes, source.intensity),
        NiftiPairs(validate, source.classes, source.intensity),
    )
