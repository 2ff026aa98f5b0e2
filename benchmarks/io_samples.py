"""What the claims of io.py read, and in which order: files, or samples that are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch

import meshwright as mw
from meshwright.data import sampler
from meshwright.data.source import IMAGE, LABEL

SAMPLES = 8


class Npy:
    """Pairs of .npy files [d, h, w], of which a read copies the box out of a memory map."""

    fields = {"image": IMAGE, "label": LABEL}  # noqa: RUF012  a constant of this small class

    def __init__(self, folder: str, samples: int = SAMPLES) -> None:
        self.folder, self.names = Path(folder), tuple(f"{i:03d}" for i in range(samples))

    def shape(self, index: int) -> tuple[int, int, int]:
        d, h, w = np.load(self.folder / f"{index:03d}-image.npy", mmap_mode="r").shape
        return d, h, w

    def read(self, index: int, spans: Sequence[slice]) -> dict[str, torch.Tensor]:
        paths = (self.folder / f"{index:03d}-{name}.npy" for name in self.fields)
        image, label = (np.array(np.load(path, mmap_mode="r")[tuple(spans)]) for path in paths)
        return {"image": torch.from_numpy(image)[None, None], "label": torch.from_numpy(label)[None]}


def write_files(folder: str, edge: int, samples: int = SAMPLES) -> None:
    draw = np.random.default_rng(0)
    for i in range(samples):
        image = (1000 * draw.standard_normal((edge,) * 3, np.float32)).astype(np.int16)
        label = draw.integers(0, 3, (edge,) * 3, np.uint8)
        np.save(f"{folder}/{i:03d}-image.npy", image.astype(np.float32))
        np.save(f"{folder}/{i:03d}-label.npy", label)
        for name, values in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), f"{folder}/{i:03d}-{name}.nii.gz")


class Made:
    """Samples that are made, not read: what memory they take is the store's alone."""

    fields = {"image": IMAGE, "label": LABEL}  # noqa: RUF012  a constant of this small class

    def __init__(self, samples: int, edge: int) -> None:
        self.names, self._shape = tuple(map(str, range(samples))), (edge,) * 3

    def shape(self, index: int) -> tuple[int, int, int]:
        return self._shape

    def read(self, index: int, spans: Sequence[slice]) -> dict[str, torch.Tensor]:
        sizes = [span.stop - span.start for span in spans]
        return {
            "image": torch.full((1, 1, *sizes), float(index)),
            "label": torch.full((1, *sizes), 1, dtype=torch.uint8),
        }


def order_of(samples: int, size: int) -> Callable[[int], tuple[int, ...]]:
    return lambda step: sampler.batch(0, step, samples, size)


def splits(ranks: int) -> dict[str, mw.Plan]:
    return {"sample": mw.Plan.uniform(data=ranks), "depth": mw.Plan.uniform(depth=ranks)}
