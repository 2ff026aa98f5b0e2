"""Augmented samples from what ranks keep: transforms say which boxes they need, and whoever holds these gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from meshwright.data import transforms
from meshwright.data.owners import Box, Owners, Shape, box_of, cell
from meshwright.data.transforms import Fields, Transform

Augment = Callable[[int, int, int], Transform]  # (step, position in the batch, sample) → what is drawn for it


class Views:
    """The transforms of one step. Pure: every rank asks for the boxes of every other and finds the same."""

    def __init__(
        self, augment: Augment, step: int, indices: Sequence[int], shape_of: Callable[[int], Shape], owners: Owners
    ) -> None:
        self._before = [shape_of(sample) for sample in indices]
        self._drawn = [augment(step, position, sample) for position, sample in enumerate(indices)]
        pairs = zip(self._drawn, self._before, strict=True)
        self.shapes: list[Shape] = [(d, h, w) for d, h, w in (drawn.output_shape(before) for drawn, before in pairs)]
        self._owners = owners
        self._found: dict[tuple[int, int], tuple[Box, ...]] = {}

    def boxes(self, position: int, rank: int) -> tuple[Box, ...]:
        """The boxes of the sample that the rank's part of the augmented one is made from. Raises `DataError`."""
        key = (position, rank)
        if key not in self._found:
            want = cell(self._owners.plan, self.shapes[position], rank, self._owners.halo)
            spans = transforms.source_spans(self._drawn[position], _slices(want), self._before[position])
            self._found[key] = tuple(box_of(span) for span in spans)
        return self._found[key]

    def built(self, position: int, parts: Sequence[Fields], want: Box, volumes: Collection[str]) -> dict[str, Tensor]:
        """The box `want` of the augmented sample, of its `boxes`."""
        return transforms.build(self._drawn[position], parts, _slices(want), self._before[position], volumes)


def _slices(box: Box) -> tuple[slice, ...]:
    return transforms.slices(box)
