"""One order of all sums on a mesh, whichever modules they are of, and whatever became of their backward.

Sums meet by their place in this order. It follows from the modules and from the order in which autograd runs, which
are the same on every rank, and not from what has arrived where. Those that a failed backward left keep their place.
"""

from __future__ import annotations

import weakref
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright.cluster.limits import exchange_timeout_s
from meshwright.cluster.process_group import when_leaving
from meshwright.errors import ExchangeError
from meshwright.parallel.collective import SumQueue
from meshwright.parallel.mesh import reduction_groups


class Run:
    """One module's part in one backward, held by the engine alone until its callback runs: gone if that never came."""


class Sums:
    """The sums of one mesh, and the runs that add to them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.queue = SumQueue()
        self._name = reduction_groups(mesh)[0].group_name
        self._runs: list[weakref.ref[Run]] = []
        self._has_failed = False

    def begin(self) -> Run:
        """A run that `end` or `fail` ends.

        Raises ExchangeError where a backward before this one failed and ranks had started different numbers of sums.
        """
        if self._has_failed or any(run() is None for run in self._runs):
            self._agree()
            self._has_failed, self._runs = False, [run for run in self._runs if run() is not None]
        run = Run()
        self._runs.append(weakref.ref(run))
        return run

    def end(self, run: Run) -> None:
        """Its sums are where they belong."""
        self._runs = [other for other in self._runs if other() is not run]
        self.queue.forget()

    def fail(self, run: Run) -> None:
        """It ends in an error, which may keep it from being gone."""
        self._runs = [other for other in self._runs if other() is not run]
        self._has_failed = True

    def _agree(self) -> None:
        """Through the job's store: whatever travels by the groups would meet what the failed backward left there."""
        me, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
        ranks, place = dist.get_world_size(), f"meshwright/failed/{self._name}"
        turn = (store.add(place, 1) - 1) // ranks  # the store may outlive process groups
        keys = [f"{place}/{turn}/{rank}" for rank in range(ranks)]
        store.set(keys[me], str(self.queue.added))
        try:
            store.wait(keys, timedelta(seconds=exchange_timeout_s()))
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {me}: a backward failed here while gradients were being summed, and this is the next one; not "
                f"all other ranks have come as far ({error}): start again from the last checkpoint"
            ) from error
        numbers = [int(store.get(key)) for key in keys]
        if len(set(numbers)) > 1:
            raise ExchangeError(
                f"rank {me}: a backward failed while gradients were being summed, when ranks 0 to {len(keys) - 1} had "
                f"started {numbers} sums, so these can no longer be matched: start again from the last checkpoint"
            )


@lru_cache(maxsize=64)
def sums_on(mesh: DeviceMesh) -> Sums:
    """The sums of a mesh."""
    return Sums(mesh)


when_leaving(sums_on.cache_clear)
