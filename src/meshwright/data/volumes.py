"""A user's own files: pairs of image and label on one grid, in any format."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import torch

from meshwright.data import once
from meshwright.data.arrays import Array, StoredArray, box_bytes, sizes
from meshwright.data.formats import open_array
from meshwright.data.grid import see_one_grid
from meshwright.data.measure import MOST_CLASSES, Spent, count_classes, has_whole_numbers, intensity, is_class
from meshwright.data.packing import Packing
from meshwright.data.raw import RawArray
from meshwright.data.source import LABEL, Field, Part, kept
from meshwright.data.views import files_of, parts_of, stacked
from meshwright.errors import DataError


@dataclass(frozen=True)
class Pair:
    """An image ([D, H, W] or [C, D, H, W]) and its label ([D, H, W]), of which the headers have been compared."""

    image: StoredArray
    label: StoredArray
    name: str = ""

    def __post_init__(self) -> None:
        shape, other = self.image.shape, self.label.shape
        if len(shape) > 4:
            raise DataError(f"{self.image.name} has shape {shape}; [D, H, W] or [C, D, H, W] is expected")
        if other[-3:] != shape[-3:] or math.prod(other[:-3]) != 1:
            raise DataError(
                f"{self.image.name} has shape {shape} but {self.label.name} has {other} (channels, then D, H, W); "
                "an image and its label must lie on the same grid: resample one to the other"
            )
        see_one_grid((*parts_of(self.image), self.label))

    @property
    def channels(self) -> int:
        return self.image.shape[0] if len(self.image.shape) == 4 else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        d, h, w = self.image.shape[-3:]
        return d, h, w


@dataclass(frozen=True)
class Pairs:
    """A `VolumeSource` over pairs. `classes` names the label values 0, 1, 2 … that may occur.

    Intensities become (value − centre) / spread. With `intensity` these two numbers are given; without, they are mean
    and standard deviation of each channel's voxels that are not 0, from one pass over the whole image in a fixed
    order, so equal on every rank whatever the plan (and counted in `read_bytes` of the rank that does it for its host).
    """

    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    intensity: tuple[float, float] | None = None
    # of each image, by number; made here and not when first asked for, which several threads may do at once
    _measured: dict[int, list[tuple[float, float]]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(pair.name or pair.image.path.name for pair in self.pairs)

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"image": Field("CDHW", (self.pairs[0].channels,), torch.float32), "label": LABEL}

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.pairs[index].shape

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        return self.pairs[index].image.spacing_mm or (1.0, 1.0, 1.0)

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` of pair `index`: image [1, c, d, h, w] float32, label [1, d, h, w] uint8.

        Raises `DataError` for damaged files, a box outside of the volume, labels that are no class number and an
        image without two different values.
        """
        d, h, w = sizes(spans)
        packed, room = Packing(self.fields).room((d, h, w))
        return self.read_into(index, spans, room, packed)

    def read_into(
        self, index: int, spans: Sequence[slice], room: Mapping[str, torch.Tensor], packed: torch.Tensor | None = None
    ) -> Part:
        """The same in `room`: image [c, d, h, w] and label [d, h, w]."""
        pair, spent = self.pairs[index], Spent()
        image_box = (*(slice(0, size) for size in pair.image.shape[:-3]), *spans)
        label_box = (*(slice(0, 1) for _ in pair.label.shape[:-3]), *spans)
        spent.read_bytes += pair.image.prepare(image_box) + pair.label.prepare(label_box)
        scales = np.array(self._intensity(index, spent), np.float32).reshape(-1, 2, 1, 1, 1)
        image, label = room["image"].numpy(), room["label"].numpy()
        target, scales = (image, scales) if len(image_box) == 4 else (image[0], scales[0])
        for where in spent.filled(pair.image, image_box, target):
            centre, spread = (scales[where[0], 0], scales[where[0], 1]) if len(image_box) == 4 else scales
            known = self.intensity is None or has_whole_numbers(pair.image)  # or found while it was measured
            if not known and not np.isfinite(target[where]).all():
                raise DataError(f"{pair.image.name}: contains NaN or infinity; replace these voxels before training")
            np.subtract(target[where], centre, out=target[where])
            np.divide(target[where], spread, out=target[where])
        self._read_label(pair.label, label_box, label, spent)
        return kept(
            room,
            read_bytes=spent.read_bytes,
            ideal_read_bytes=box_bytes(pair.image, image_box) + box_bytes(pair.label, label_box),
            transient_bytes=spent.transient_bytes,
            shared_bytes=spent.shared_bytes,
            packed=packed,
        )

    def _intensity(self, index: int, spent: Spent) -> list[tuple[float, float]]:
        """(centre, spread) of each channel, measured once on this host if it is not given."""
        if self.intensity is not None:
            return [self.intensity] * self.pairs[index].channels
        if index not in self._measured:
            image = self.pairs[index].image

            def make(file: BinaryIO) -> None:
                file.write(json.dumps(intensity(image, spent)).encode())

            named = [part.name for part in parts_of(image)]
            key = once.identity(files_of(image), *named, "intensity") if once.several_ranks() else None
            file = once.once(key, 0, make) if key is not None else None
            if file is None:
                self._measured[index] = intensity(image, spent)
            else:
                with file:
                    file.seek(0)
                    self._measured[index] = [(mean, spread) for mean, spread in json.load(file)]
        return self._measured[index]

    def _read_label(self, label: StoredArray, box: Sequence[slice], target: Array, spent: Spent) -> None:
        """`target` is [d, h, w], the box may have channels, of which there is one."""
        if isinstance(label, RawArray) and label.dtype == target.dtype:
            for where in spent.filled(label, box, target.reshape(sizes(box))):
                self._class_numbers(label, target[where[-1:]])
            return
        whole = has_whole_numbers(label)
        for where, values in (spent.whole_numbers if whole else spent.values)(label, box):
            target[where[-1:]] = self._class_numbers(label, values).reshape(-1, *target.shape[1:])

    def _class_numbers(self, label: StoredArray, values: Array) -> Array:
        if values.dtype.kind in "biu":  # the ends tell, without a pass for each condition
            fine = not values.size or (values.min() >= 0 and values.max() < len(self.classes))
        else:
            fine = bool(is_class(values, len(self.classes)).all())
        if not fine:
            wrong = values[~is_class(values, len(self.classes))]
            raise DataError(
                f"{label.name}: label value {wrong[0]:g}; whole numbers from 0 to {len(self.classes) - 1} are expected "
                f"for the {len(self.classes)} classes {', '.join(self.classes)}"
            )
        return values.astype(np.uint8, copy=False)


def opened(cases: Iterable[Callable[[], list[Pair]]], bad: list[str] | None) -> list[Pair]:
    """The pairs of all cases; with a list `bad` the reason of one that cannot be opened is added to it instead."""
    found: list[Pair] = []
    for case in cases:
        try:
            found.extend(case())
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
    return found


def make_pairs(
    pairs: Sequence[Pair],
    classes: Sequence[str] = (),
    intensity: tuple[float, float] | None = None,
    bad: list[str] | None = None,
) -> Pairs:
    """A source over `pairs`; without `classes` they are counted in the labels.

    With a list `bad` pairs of other channels than the first are left out, and the reasons added to it.
    Raises `DataError` when channels differ, and for fewer than 2 or more than 255 classes.
    """
    if classes and not 2 <= len(classes) <= MOST_CLASSES:
        raise DataError(f"data.classes names {len(classes)} classes; 2 to {MOST_CLASSES} are possible")
    if intensity is not None and not (math.isfinite(intensity[0]) and 0 < intensity[1] < math.inf):
        raise DataError(
            f"data.intensity is {list(intensity)}; both numbers must be finite, and the second, the spread, must be "
            "above 0"
        )
    for pair in pairs[1:]:
        if pair.channels != pairs[0].channels:
            reason = (
                f"{pairs[0].image.name} has {pairs[0].channels} channel(s) but {pair.image.name} has {pair.channels}; "
                "a network takes one number of channels: give all images the same"
            )
            if bad is None:
                raise DataError(reason)
            bad.append(reason)
    pairs = [pair for pair in pairs if pair.channels == pairs[0].channels]
    return Pairs(tuple(pairs), tuple(classes) or count_classes([pair.label for pair in pairs]), intensity)


def open_pairs(
    images: str | Sequence[str],
    labels: str,
    classes: Sequence[str] = (),
    intensity: tuple[float, float] | None = None,
    bad: list[str] | None = None,
) -> Pairs:
    """Pairs from two file patterns such as "scans/*_t1.nii.gz", in order of their names; headers are compared.

    Several patterns of images, each for files [D, H, W], are the channels of one image, in this order.

    Raises `DataError` when a pattern finds nothing, when the counts differ, as `make_pairs` does, and for any file that
    is damaged or does not match its partner; with a list `bad` such a pair is left out, and the reason added to it.
    """
    patterns = (images,) if isinstance(images, str) else tuple(images)
    if not patterns:
        raise DataError("data.images is an empty list; one pattern or more are needed")
    found = [sorted(glob.glob(pattern, recursive=True)) for pattern in (*patterns, labels)]
    for pattern, files in zip((*patterns, labels), found, strict=True):
        if not files:
            raise DataError(f"data.{'labels' if files is found[-1] else 'images'}: no file matches {pattern!r}")
    for pattern, files in zip(patterns, found, strict=False):
        if len(files) != len(found[-1]):
            raise DataError(
                f"data.images {pattern!r} finds {len(files)} files but data.labels {labels!r} finds "
                f"{len(found[-1])}; each image needs one label, and sorted by name they must correspond"
            )

    def pair(names: Sequence[str]) -> Callable[[], list[Pair]]:
        def case() -> list[Pair]:
            *channels, label = map(open_array, names)
            name = "" if len(channels) == 1 else label.path.name
            return [Pair(stacked(channels), label, name)]

        return case

    pairs = opened(map(pair, zip(*found, strict=True)), bad)
    if not pairs:
        raise DataError(f"data.images {images!r}: no pair can be opened; {'; '.join(bad or [])}")
    return make_pairs(pairs, classes, intensity, bad)


def of_one_size(source: Pairs, bad: list[str]) -> Pairs:
    """The pairs of the size that most of them have (among equals the one that comes first), for batches of several; why
    the others are left out is added to `bad`."""
    shapes = [pair.shape for pair in source.pairs]
    usual = max(dict.fromkeys(shapes), key=shapes.count)
    for pair in source.pairs:
        if pair.shape != usual:
            bad.append(
                f"{pair.image.name} has shape {pair.shape}, most samples have {usual} (D, H, W); samples of one batch "
                "need one size"
            )
    return replace(source, pairs=tuple(pair for pair in source.pairs if pair.shape == usual))


def hold_out(source: Pairs, fraction: float = 0.2) -> tuple[Pairs, Pairs]:
    """(train, validate): the last `fraction` of the pairs, at least one, is held out.

    Raises `DataError` below 2 pairs.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"data.held_out = {fraction}: a share of 0 or more and less than 1 is needed")
    count = len(source.pairs)
    held = max(1, round(fraction * count))
    if held >= count:
        raise DataError(
            f"{count} pair(s), {held} of them held out, leave nothing to train on; "
            "give more files, or make data.held_out smaller"
        )
    return replace(source, pairs=source.pairs[:-held]), replace(source, pairs=source.pairs[-held:])
