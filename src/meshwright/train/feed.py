"""Where the batches of a run come from: parts that each rank keeps all of, or the store within `data.memory_mib`.

Both give the same bits. The store reads ahead in threads, and what does not fit goes to a nameless file in the run
directory (`data.spill`) or is read again. A step with a sample that is left out (`skipping`) is read without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from meshwright.data.delivery import Batch as Parts
from meshwright.data.owners import Shape, place, sizes
from meshwright.data.source import IMAGE_BYTES, LABEL_BYTES, ReadStats
from meshwright.data.store import Store
from meshwright.data.transforms import Transform
from meshwright.errors import ConfigError
from meshwright.train.batches import Batch, augmented, drawn, find_foreground, placed, training_batch
from meshwright.train.job import Job, batch_size, recipe
from meshwright.train.skipping import agreed

MIB = 1 << 20


@dataclass(frozen=True)
class Waiting:
    """Seconds that training waited for the store, and the threads that read ahead now; without a store 0 and 0."""

    wait_s: float = 0.0
    loaders: int = 0


class Feed:
    """The batches of the steps after `done`, in order. Collective; leaving the block ends all threads.

    Raises `ConfigError` where `data.memory_mib` is too small for one step, `DataError`, `ExchangeError`.
    """

    def __init__(self, job: Job, done: int, run: Path) -> None:
        self._job, self._store = job, None
        data, last = job.config.data, job.config.train.steps
        if data.memory_mib is not None and done < last:
            assert job.reads is not None
            if self._skips_foreground:
                find_foreground(job, self._seen(done + 1, last))
            self._store = Store(
                job.reads,
                job.plan,
                self._order,
                budget_bytes=data.memory_mib * MIB,
                first=done + 1,
                last=last + 1,
                augment=None if recipe(job.config).is_nothing else self._drawn,
                spill=run if data.spill else None,
                device=job.device,
            )

    def _order(self, step: int) -> Sequence[int]:
        return self._job.at(step).batch(batch_size(self._job.config, self._job.plan))

    def _seen(self, first: int, last: int) -> list[int]:
        """The samples of these steps."""
        found: set[int] = set()
        for step in range(first, last + 1):
            found.update(self._order(step))
            if len(found) == len(self._job.train.names):
                break
        return sorted(found)

    def _drawn(self, step: int, position: int, sample: int) -> Transform:
        job = self._job
        boxes = job.foreground.known(sample) if self._skips_foreground and job.foreground is not None else None
        return drawn(job, job.at(step).seen + position, sample, boxes)

    @property
    def _skips_foreground(self) -> bool:
        config = self._job.config
        return config.data.on_bad == "skip" and config.augment.patch_foreground > 0

    def batch(self, step: int) -> Batch:
        """The augmented batch of `step` (from 1)."""
        store = self._store
        if store is None:
            return training_batch(self._job, step)
        if self._job.config.data.on_bad == "stop":
            part = self._taken(store, step)
        else:
            reads = self._job.reads
            assert reads is not None
            known = not reads.left_out.keys().isdisjoint(self._order(step))
            found = agreed(reads, lambda: self._taken(store, step), together=self._job.split)
            if found is None or known:
                store.pass_over(step)
                return training_batch(self._job, step, reads)
            part = found
        count, *volume = part.shape
        shape = (count, self._job.train.fields["image"].sizes[0], *volume)
        return augmented(self._job, step, placed(self._job, part["image"], part["label"], shape))

    def _taken(self, store: Store, step: int) -> Parts:
        try:
            return store.batch(step)
        except ConfigError as error:
            raise ConfigError(f"data.memory_mib = {self._job.config.data.memory_mib}: {error}") from None

    @property
    def waiting(self) -> Waiting:
        """Since the start."""
        store = self._store
        return Waiting() if store is None else Waiting(store.stats.wait_s, store.workers)

    @property
    def held(self) -> ReadStats:
        """What this rank keeps of the training data, at most at one moment, beside its share of them; and its reads."""
        if self._store is None:
            return self._job.train.stats
        read = sum(self._job.reading.values(), ReadStats())
        return ReadStats(read.read_bytes, read.ideal_read_bytes, self._store.peak_bytes, self._share_bytes())

    def _share_bytes(self) -> int:
        """Of all samples that this rank's group keeps, in memory or on disk."""
        job, owners = self._job, None if self._store is None else self._store.owners
        assert owners is not None
        group, channels = place(job.plan, job.rank)[0], job.train.fields["image"].sizes[0]
        own = [sample for sample in range(len(job.train.names)) if owners.owner(sample) == group]
        boxes: list[Shape] = [sizes(owners.held(sample, job.rank)) for sample in own]
        return sum(map(math.prod, boxes)) * (IMAGE_BYTES * channels + LABEL_BYTES)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            self._store.close()
