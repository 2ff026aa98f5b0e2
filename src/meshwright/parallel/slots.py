"""Memory that two processes share, seen as the tensors of a piece."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from operator import attrgetter

import torch

_shape = attrgetter("shape")
MOST_PLACES = 64  # kinds of pieces whose places in a slot are remembered


class Memory:
    """Memory that one process writes and its neighbour reads."""

    def __init__(self, file: int, size: int) -> None:
        self.size = size
        self._pages = mmap.mmap(file, size)
        self._places: dict[tuple[object, ...], list[torch.Tensor]] = {}

    def places(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Where the parts of a piece lie, one behind the other: the same pieces come in every step."""
        key = (parts[0].dtype, *map(_shape, parts))
        known = self._places.get(key)
        if known is not None:
            return known
        if len(self._places) >= MOST_PLACES:
            self._places.clear()
        found, at = [], 0
        with torch.inference_mode(False):  # they will be written in training, too
            for part in parts:
                count = part.numel()
                line = (
                    torch.frombuffer(self._pages, dtype=part.dtype, count=count, offset=at)
                    if count
                    else torch.empty(0, dtype=part.dtype, device="cpu")
                )
                found.append(line.view(part.shape))
                at += count * part.element_size()
        self._places[key] = found
        return found
