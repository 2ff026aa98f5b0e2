"""Who is compared in `loaders` (io_loaders.py): each gives this rank its part of the same batches, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import meshwright as mw
from meshwright.data import sampler
from meshwright.data.kept import Kept
from meshwright.data.prefetch import processors
from meshwright.data.source import batch_shape, read_batch
from meshwright.data.store import Store
from meshwright.data.volumes import open_pairs

SAMPLES, SIZE, LATER = 8, 2, 4  # samples, in a batch, epochs after the first
CLASSES = ("a", "b", "c")
CENTRE, SPREAD = 12.0, 1000.0

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """What every contender is asked for: steps of `SIZE` samples of these files, and of them this rank's part."""

    folder: str
    ending: str
    plan: mw.Plan
    rank: int

    @property
    def epoch(self) -> int:
        return SAMPLES // SIZE

    @property
    def steps(self) -> int:
        return self.epoch * (1 + LATER)

    def order(self, step: int) -> tuple[int, ...]:
        return sampler.batch(0, step, SAMPLES, SIZE)

    def path(self, index: int, field: str) -> str:
        return f"{self.folder}/{index:03d}-{field}{self.ending}"

    def part(self, image: Tensor, label: Tensor) -> Batch:
        """This rank's part of a batch of whole samples: image [n, 1, d, h, w], label [n, d, h, w]."""
        spans = mw.interval(tuple(image.shape), self.plan, self.rank)
        return {"image": image[spans].contiguous(), "label": label[(spans[0], *spans[2:])].contiguous()}


class Files(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Whole samples, as a user of plain torch would write it."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __len__(self) -> int:
        return SAMPLES

    def _load(self, index: int, field: str) -> Any:
        path = self.work.path(index, field)
        return np.load(path) if path.endswith(".npy") else np.asanyarray(nibabel.load(path).dataobj).T

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._load(index, "image").astype(np.float32)
        image -= np.float32(CENTRE)
        image /= np.float32(SPREAD)
        return torch.from_numpy(image)[None], torch.from_numpy(np.ascontiguousarray(self._load(index, "label")))


class Order:
    """The batches of one epoch after the other."""

    def __init__(self, work: Work) -> None:
        self.work, self.next_step = work, 0

    def __len__(self) -> int:
        return self.work.epoch

    def __iter__(self) -> Iterator[list[int]]:
        first, self.next_step = self.next_step, self.next_step + self.work.epoch
        for step in range(first, first + self.work.epoch):
            yield list(self.work.order(step))


def plain(work: Work, workers: int) -> Iterator[Batch]:
    more: dict[str, Any] = {}
    if workers:  # forked, as in any script on Linux: here the ranks' own way to start would be inherited instead
        more = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader: Any = DataLoader(Files(work), batch_sampler=Order(work), **more)
    while True:
        for image, label in loader:
            yield work.part(image, label)


def monai_cache(work: Work, threads: bool) -> Iterator[Batch]:
    from monai import data, transforms

    both, is_nifti = ["image", "label"], work.ending != ".npy"
    steps = [
        transforms.LoadImaged(both),
        transforms.EnsureChannelFirstd(both, channel_dim="no_channel"),
        *([transforms.Transposed(both, (0, 3, 2, 1))] if is_nifti else []),  # x, y, z → depth, height, width
        transforms.NormalizeIntensityd(["image"], CENTRE, SPREAD),
        transforms.EnsureTyped(both, dtype=[torch.float32, torch.uint8], track_meta=False),
    ]
    files = [{field: work.path(index, field) for field in both} for index in range(SAMPLES)]
    hands = max(1, (os.cpu_count() or 1) // work.plan.ranks)
    cached = data.CacheDataset(files, transforms.Compose(steps), num_workers=hands, progress=False)
    loader: Any = (data.ThreadDataLoader if threads else data.DataLoader)(
        cached, num_workers=0, batch_sampler=Order(work)
    )
    while True:
        for batch in loader:
            yield work.part(batch["image"], batch["label"][:, 0])


def pairs(work: Work) -> Any:
    patterns = (f"{work.folder}/*-{field}{work.ending}" for field in ("image", "label"))
    return open_pairs(*patterns, CLASSES, intensity=(CENTRE, SPREAD))


def kept(work: Work) -> Iterator[Batch]:
    source = Kept(pairs(work), processors())
    for step in range(work.steps):
        indices = work.order(step)
        yield read_batch(source, indices, mw.interval(batch_shape(source, indices), work.plan, work.rank))


def stored(work: Work) -> Iterator[Batch]:
    with Store(pairs(work), work.plan, work.order, budget_bytes=4 << 30, last=work.steps) as store:
        for batch in store:
            yield {name: batch[name] for name in ("image", "label")}


CONTENDERS: dict[str, Callable[[Work], Iterator[Batch]]] = {
    "Store": stored,
    "Kept": kept,
    "DataLoader, 0 workers": lambda work: plain(work, 0),
    "DataLoader, 2 workers": lambda work: plain(work, 2),
    "MONAI CacheDataset": lambda work: monai_cache(work, threads=False),
    "the same, ThreadDataLoader": lambda work: monai_cache(work, threads=True),
}
MONAIS = ("MONAI CacheDataset", "the same, ThreadDataLoader")
