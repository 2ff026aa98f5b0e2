"""The batch of a step: each rank cuts its part of the cubes it has a share in, and turns it as they are turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

import meshwright as mw
from cosmostudy import symmetries
from cosmostudy.cubes import Cubes
from meshwright.data.sampler import Sampler, Shuffled
from meshwright.data.store import Store
from meshwright.plan.geometry import Interval
from meshwright.plan.plan import Plan

MEASURED = 64  # universes whose counts say how inputs are scaled
COUNTS = 1 << 15  # an int16 count is below it


@dataclass(frozen=True)
class Scale:
    """(log(1 + count) − mean) / deviation: the input of the network, as the original takes the logarithm of counts."""

    mean: float
    deviation: float

    @classmethod
    def measured(cls, source: Cubes) -> Scale:
        """Mean and deviation of log(1 + count) over the first training universes; the same on every rank."""
        histogram = torch.zeros(COUNTS, dtype=torch.int64)
        whole = [slice(0, source.size)] * 3
        for index in range(min(source.universes, MEASURED) * source.per_universe):
            counts = torch.from_numpy(source.counts(index, whole)).flatten().long()
            histogram += torch.bincount(counts, minlength=COUNTS)
        share = histogram.double() / histogram.sum()
        value = torch.arange(COUNTS, dtype=torch.float64).log1p()
        mean = (share * value).sum()
        return cls(float(mean), float((share * (value - mean) ** 2).sum().sqrt()))

    def table(self, dtype: torch.dtype) -> Tensor:
        """The scaled value of each count."""
        value = torch.arange(COUNTS, dtype=torch.float64).log1p()
        return ((value - self.mean) / self.deviation).to(dtype)


def part(source: Cubes, plan: Plan, rank: int, indices: Sequence[int], numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `rank` holds of a batch of cubes, each under the symmetry of its number: pure reading, nothing is sent.

    Returns counts [n, C, d, h, w] int16 and targets [n, 4] float32.
    """
    size, (channels,) = source.size, source.fields["image"].sizes
    mine, _, *spans = mw.interval((len(indices), channels, size, size, size), plan, rank)
    counts = torch.empty(mine.stop - mine.start, channels, *(s.stop - s.start for s in spans), dtype=torch.int16)
    box = tuple(Interval(span.start, span.stop) for span in spans)
    ends = tuple((span.start, span.stop) for span in spans)
    for place, (index, number) in enumerate(zip(indices[mine], numbers[mine], strict=True)):
        found = {"image": torch.from_numpy(source.counts(index, symmetries.source(number, ends, size)))}
        counts[place] = symmetries.symmetry(number).build([found], box, (size, size, size))["image"]
    return counts, source.targets[[index // source.per_universe for index in indices[mine]]]


class Batches:
    """What the ranks of a plan train on: split tensors of cubes and their targets.

    The order of the cubes is the library's sampler's: a function of the seed and of how many have been seen. With
    `store_mib` the parts come from the distributed store (each block is read by one rank group and travels), else
    each rank reads, and keeps, the blocks that it needs.
    """

    def __init__(
        self,
        source: Cubes,
        plan: Plan,
        rank: int,
        scale: Scale,
        dtype: torch.dtype,
        device: torch.device,
        *,
        size: int,
        seed: int = 0,
        turned: bool = False,
    ) -> None:
        self.source, self.plan, self.rank, self.device = source, plan, rank, device
        self.size, self.seed, self.turned, self.dtype = size, seed, turned, dtype
        self._table = scale.table(dtype).to(device)
        self._store: Store | None = None

    def indices(self, step: int) -> tuple[int, ...]:
        """The cubes of `step` (from 0)."""
        return Sampler(Shuffled(len(self.source)), self.seed, step * self.size).batch(self.size)

    def serve(self, first: int, last: int, store_mib: int | None) -> Batches:
        """Get the steps `first` … `last` − 1 from a distributed store of this size, if one is given."""
        if store_mib is not None:
            augment: Callable[[int, int, int], symmetries.Compose] | None = None
            if self.turned:
                augment = self._augment
            self._store = Store(
                self.source, self.plan, self.indices, budget_bytes=store_mib << 20, first=first, last=last,
                augment=augment,
            )  # fmt: skip
        return self

    def _augment(self, step: int, position: int, sample: int) -> symmetries.Compose:
        return symmetries.symmetry(symmetries.draw(self.seed, step * self.size + position, 1)[0])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, C, D, H, W] and targets [N, 4] of `step`, split as the plan says."""
        indices = self.indices(step)
        if self._store is not None:
            taken = self._store.batch(step)
            return self._placed(taken["image"], taken["target"], len(indices))
        numbers = symmetries.draw(self.seed, step * self.size, self.size) if self.turned else [0] * self.size
        return self.of(indices, numbers)

    def of(self, indices: Sequence[int], numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these cubes, each under the symmetry of its number."""
        return self._placed(*part(self.source, self.plan, self.rank, indices, numbers), len(indices))

    def _placed(self, counts: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """This rank's counts and targets as the split tensors that the network takes."""
        size = self.source.size
        image = self._table[counts.to(self.device).int()].contiguous(memory_format=torch.channels_last_3d)
        shape = (count, counts.shape[1], size, size, size)
        wanted = targets.to(self.device, self.dtype)
        return mw.from_local(image, self.plan, shape), mw.from_local(wanted, self.plan, (count, 4))

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            self._store.close()
