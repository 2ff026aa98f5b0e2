"""Augmented samples as a source: what reads parts of volumes reads parts of augmented volumes.

And, for parts that are in memory already with some voxels around them (`Store(halo=…)`), a reader of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import EllipsisType

from meshwright.data import transforms
from meshwright.data.source import Part, ReadStats, VolumeSource, Wrapped
from meshwright.data.transforms import Fields, Reader, Transform
from meshwright.errors import DataError


class Augmented(Wrapped):
    """A `VolumeSource` of which sample i is the sample `indices[i]` of `source` under `drawn[i]`.

    Boxes that are exactly what the transform makes come from `source`; other boxes, which differ from step to step,
    from `fresh` (None: `source` too), so that a source that keeps what it has read does not keep each of them.
    """

    def __init__(
        self,
        source: VolumeSource,
        indices: Sequence[int],
        drawn: Sequence[Transform],
        fresh: VolumeSource | None = None,
    ) -> None:
        if len(indices) != len(drawn):
            raise ValueError(f"{len(indices)} samples but {len(drawn)} transforms")
        super().__init__(source)
        self._indices, self._drawn = tuple(indices), tuple(drawn)
        self._fresh = fresh if fresh is not None else source

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._source.names[index] for index in self._indices)

    def shape(self, index: int) -> tuple[int, int, int]:
        """D, H, W of the augmented sample. Raises `DataError` if its transform does not fit."""
        d, h, w = self._drawn[index].output_shape(self._source.shape(self._indices[index]))
        return d, h, w

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """As in the file, before any turn."""
        return self._source.spacing_mm(self._indices[index])

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` of augmented sample `index`; raises `DataError` as the source and the transform do."""
        sample, transform = self._indices[index], self._drawn[index]
        shape = self._source.shape(sample)
        boxes = transforms.source_spans(transform, spans, shape)
        source = self._source if boxes == (tuple(spans),) else self._fresh
        parts = [source.read(sample, box) for box in boxes]
        volumes = [name for name, field in self.fields.items() if field.is_volume]
        one = [{name: tensor[0] for name, tensor in part.items()} for part in parts]
        built = transforms.build(transform, one, spans, shape, volumes)
        stats = sum((part.stats for part in parts), ReadStats())
        return Part({name: tensor[None] for name, tensor in built.items()}, stats)


def held(part: Fields, spans: Sequence[slice], volumes: Collection[str] | None = None) -> Reader:
    """A reader of the box `spans` (a rank's part of a sample, and a halo around it) that `part` holds of every field.

    What stays within the halo needs no file: intensities and noise, `Affine` and `Elastic` if it is their `halo` + 2
    wide. The reader raises `DataError` for a box outside of what is held. `volumes`: as in `transforms.read`.
    """

    def reader(box: tuple[slice, ...]) -> Fields:
        for want, have in zip(box, spans, strict=True):
            if want.stop > want.start and not (have.start <= want.start and want.stop <= have.stop):
                raise DataError(
                    f"this augmentation needs the voxels {box} but this rank holds {tuple(spans)}: "
                    "keep a wider halo, or read from the files (Augmented)"
                )
        own = [slice(max(w.start - h.start, 0), max(w.stop - h.start, 0)) for w, h in zip(box, spans, strict=True)]
        cut: tuple[EllipsisType | slice, ...] = (..., *own)
        chosen = transforms.volumes_of(part, len(spans)) if volumes is None else volumes
        return {name: x[cut] if name in chosen else x for name, x in part.items()}

    return reader
