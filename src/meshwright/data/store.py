"""The samples of a training run in the memory of its ranks, and the batch of each step when it is needed.

    with Store(source, plan, order, budget_bytes=4 << 30, last=steps) as store:
        for batch in store:                 # batch.step, batch.indices, batch["image"]: this rank's part
            ...

A sample is read from its files when the first step needs it, by the ranks that need it then, and stays with them
(`owners`): in memory within the budget, else on local disk, else it is read again (`cache`, `spill`). Threads read
ahead (`prefetch`); one more carries what a step needs from other ranks (`moves`) and puts batches together.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from meshwright.cluster.limits import exchange_timeout_s
from meshwright.cluster.process_group import ensure_process_group, when_leaving
from meshwright.data.cache import Cache, CacheStats, Uses
from meshwright.data.delivery import Batch, Delivery, Readable
from meshwright.data.moves import Exchange
from meshwright.data.owners import Owners, Shape
from meshwright.data.pipeline import Pipeline
from meshwright.data.prefetch import PipelineStats
from meshwright.data.spill import Spill
from meshwright.data.store_views import Augment
from meshwright.errors import ConfigError
from meshwright.plan.plan import Plan

MOST_AHEAD = 8  # steps that are read ahead at most


class Store:
    """Batches of the steps `first` to `last` (exclusive; None: without end), in order, each once.

    Collective: all ranks of `plan` make it alike, ask for the same steps and close it. `order(step)` gives the samples
    of a step's whole batch, equal on all ranks. `reading` says which rank reads and keeps what (default: `plan`);
    `halo` widens each rank's box (D, H, W); `augment` gives the transform of each sample of a step, equal on all ranks,
    which is then made from what the ranks keep. `budget_bytes` holds for everything the store keeps and carries on this
    rank. `spill` names a folder on local disk for what does not fit; None: it is read again. `ahead` and `workers`
    limit and fix the reading ahead; by default the number of threads is tuned. `timeout_s` limits each exchange.

    Raises `ConfigError` for what does not fit together; a budget too small for a few steps shows at the first step.
    """

    def __init__(
        self,
        source: Readable,
        plan: Plan,
        order: Callable[[int], Sequence[int]],
        *,
        budget_bytes: int,
        first: int = 0,
        last: int | None = None,
        reading: Plan | None = None,
        halo: Shape = (0, 0, 0),
        augment: Augment | None = None,
        spill: str | Path | None = None,
        ahead: int = MOST_AHEAD,
        workers: int | None = None,
        timeout_s: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if reading is not None and reading.ranks != plan.ranks:
            raise ConfigError(f"reading under {reading} needs {reading.ranks} ranks, the plan {plan} has {plan.ranks}")
        if plan.ranks > 1:
            ensure_process_group(plan.ranks)
        if budget_bytes < 1 or (workers is not None and workers < 1):
            raise ConfigError(f"budget_bytes = {budget_bytes}, workers = {workers}: at least 1 is needed")
        self.plan, self.rank = plan, dist.get_rank() if plan.ranks > 1 else 0
        self.owners = Owners(source.shape, plan, reading, halo, views=augment is not None)
        epoch = -(-len(source.names) // max(1, len(order(first))))
        uses = Uses(order, first, last, 2 * epoch + 1)
        self._cache = Cache(budget_bytes, uses, None if spill is None else Spill(spill))
        on_gpu = device is not None and device.type == "cuda"
        delivery = Delivery(source, self.owners, self.rank, order, augment, None if on_gpu else self._cache.pages)
        exchange = None
        if not self.owners.moves_nothing:
            exchange = Exchange(self.owners.circles, self.rank, exchange_timeout_s(timeout_s))
        self._pipeline = Pipeline(delivery, self._cache, exchange, first, last, ahead, workers, device)
        _open.add(self)

    @property
    def stats(self) -> PipelineStats:
        """What the steps so far have waited for, read and moved."""
        return self._pipeline.stats

    @property
    def cache_stats(self) -> CacheStats:
        """Where the parts came from."""
        return self._cache.stats

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the store has kept and carried at one moment."""
        return self._cache.peak_bytes

    @property
    def workers(self) -> int:
        """How many threads read ahead now."""
        return self._pipeline.workers

    @property
    def next_step(self) -> int:
        """The step that can be asked for."""
        return self._pipeline.next_step

    def batch(self, step: int) -> Batch:
        """The batch of `step`, which must be the one after the last. Raises `DataError`, `ExchangeError`."""
        return self._pipeline.take(step)

    def pass_over(self, step: int) -> None:
        """Leave out `step`, for which `batch` has just raised `DataError`, or which was had: the next one is the one
        behind it. All ranks alike. Raises `ExchangeError`."""
        self._pipeline.pass_over(step)

    def __iter__(self) -> Iterator[Batch]:
        while not self._pipeline.is_over:
            yield self._pipeline.take(self._pipeline.next_step)

    def close(self) -> None:
        """End all threads and give memory and disk back. Never hangs; other ranks that wait are told."""
        if self._pipeline.close():  # else a thread may still write to the file
            self._cache.close()
        _open.discard(self)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_open: weakref.WeakSet[Store] = weakref.WeakSet()


def _close_all() -> None:
    for store in list(_open):
        store.close()


when_leaving(_close_all)
atexit.register(_close_all)
