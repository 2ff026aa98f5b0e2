"""Parameter gradients: summed over the ranks in buckets while backward still runs, complete when it returns.

A parameter that ranks used on different data has a gradient in summands (Partial); one of which each rank used its own
filters has it in parts (Shard), which are gathered. Buckets hold parameters in the
reverse order of the module; a bucket starts one all-reduce in the background when all its gradients are there and
the bucket before it has started; the end of backward starts the rest and hands each gradient its sum. Contents and
order of the buckets depend on the module alone, so they are the same on every rank, whatever the order in which a
rank's gradients become ready.
"""

from __future__ import annotations

import time
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd import Variable

from meshwright.errors import ExchangeError, MeshwrightError, UnsupportedError
from meshwright.parallel.account import totals
from meshwright.parallel.apply import set_reducer
from meshwright.parallel.mesh import reduction_groups
from meshwright.parallel.tensor import is_mesh
from meshwright.plan.exchange import buckets
from meshwright.sync.flights import Gathered, Summed, as_summand, way_of
from meshwright.sync.order import Run, Sums, sums_on

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def _named() -> Iterator[None]:
    """What a neighbour's end or silence raises, by its name."""
    try:
        yield
    except MeshwrightError:
        raise
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {dist.get_rank()}: another rank did not answer while gradients were summed: {error}"
        ) from error


_REDUCED_BY = "_meshwright_reduced_by"  # an attribute of parameters: the mark of who reduces their gradients


def _living(bucket: list[weakref.ref[Any]]) -> list[Any]:
    return [p for ref in bucket if (p := ref()) is not None]


def _parameters(root: torch.nn.Module) -> list[Any]:
    """Those of `root.parameters()`, in that order, but as often as they are used, in a fifth of its time: they are
    looked through in every step."""
    found: list[Any] = []
    seen: set[int] = set()
    open_: list[torch.nn.Module | None] = [root]
    while open_:
        module = open_.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for p in module._parameters.values() if module._parameters else ():
            if p is not None:
                found.append(p)
        if module._modules:
            open_.extend([*module._modules.values()][::-1])
    return found


class Reducer:
    """The bucketed reduction of one parallelized module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.enabled = True
        # Weak: the parameters' hooks hold the reducer, and a cycle through a hook is never collected.
        self._buckets: list[list[weakref.ref[Any]]] = []
        self._known: dict[int, weakref.ref[Any]] = {}  # parameters by number, which another may have later
        self._mark = object()  # on parameters that are known
        self._reset()
        self.adopt(module)

    def adopt(self, module: torch.nn.Module) -> None:
        """Take in parameters that are trained and not known yet: all at first, later those that were unfrozen."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint recomputes within a backward whose buckets are under way
        with torch._C.DisableTorchFunctionSubclass():  # what is asked here needs no rule, in every forward
            found: list[Any] = [
                p
                for p in _parameters(module)
                if p.requires_grad
                and getattr(p, _REDUCED_BY, None) is not self._mark
                and not self._knows(p)
                and is_mesh(p)
                and p._spec.mesh.size() > 1  # alone there is nothing to sum
                # not what `functional_call` puts in their place for one call
                and isinstance(p, torch.nn.Parameter)
                and p.is_leaf
            ]
        found = list({id(p): p for p in found}.values())
        first = len(self._buckets)
        places = buckets([p._local_tensor.numel() * p._local_tensor.element_size() for p in found])
        self._buckets += [[] for _ in range(max(places, default=-1) + 1)]
        for p, place in reversed(list(zip(found, places, strict=True))):
            self._buckets[first + place].append(weakref.ref(p))
            self._known[id(p)] = weakref.ref(p)
            p.__dict__[_REDUCED_BY] = self._mark
            p.register_post_accumulate_grad_hook(partial(self._ready, first + place))
        if found:
            self._reset()

    def _reset(self) -> None:
        self._missing = [{id(p) for p in _living(bucket)} for bucket in self._buckets]
        self._started = 0
        self._flights: list[Summed | Gathered] = []
        self._sums: Sums | None = None
        self._run: weakref.ref[Run] | None = None

    def _begin(self, mesh: Any) -> Sums:
        """What this backward's sums are added to. Where the one before raised, its callback and run never came."""
        self._reset()
        sums = sums_on(mesh)
        run = sums.begin()
        Variable._execution_engine.queue_callback(partial(self._finish, sums, run))
        self._sums, self._run = sums, weakref.ref(run)
        return sums

    def _knows(self, p: Any) -> bool:
        known = self._known.get(id(p))
        return known is not None and known() is p

    def _ready(self, place: int, p: Any) -> None:
        if not self.enabled:
            return
        run, sums = self._run, self._sums
        if run is None or sums is None or run() is None:
            sums = self._begin(p._spec.mesh)
        if place < self._started:
            raise UnsupportedError(
                "a gradient was accumulated again after its sum had started (a parameter used in several reentrant "
                "checkpoints); use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        self._missing[place].discard(id(p))
        while self._started < len(self._buckets) and not self._missing[self._started]:
            self._start_next(sums)

    def _start_next(self, sums: Sums) -> None:
        groups: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}
        for p in _living(self._buckets[self._started]):
            grad = p.grad
            if grad is None:
                continue
            way = way_of(grad._spec)
            if way is None:
                as_summand(grad)
                way = way_of(grad._spec)
            if way != ():
                groups.setdefault((way, grad._local_tensor.dtype), []).append((p, grad))
        for (way, _), found in groups.items():
            with _named():
                self._flights.append(Gathered(found, way) if isinstance(way, int) else Summed(found, way))
                sums.queue.add(self._flights[-1].work)
        self._started += 1

    def _finish(self, sums: Sums, run: Run) -> None:
        start, changed = time.perf_counter(), []
        try:
            while self._started < len(self._buckets):
                self._start_next(sums)
            with _named():
                sums.queue.fold(flight.work for flight in self._flights)
                for flight in self._flights:
                    changed += flight.land(sums.queue)
        except BaseException:
            sums.fail(run)
            raise
        finally:
            self._reset()
        sums.end(run)
        totals.reduction_s += time.perf_counter() - start
        if changed:
            raise UnsupportedError(
                f"a hook changed the gradients of parameters of shape {', '.join(map(str, changed))} while their sums "
                "were under way; use p.register_hook, which sees the gradient before, or change it after backward()"
            )


_reducers: weakref.WeakKeyDictionary[torch.nn.Module, Reducer] = weakref.WeakKeyDictionary()


def attach(module: torch.nn.Module) -> None:
    """Reduce the gradients of `module` from now on; nothing to do on one rank or where it is done already."""
    if module in _reducers:
        _reducers[module].adopt(module)
        return
    mesh = next((p._spec.mesh for p in module.parameters() if is_mesh(p)), None)
    if mesh is not None and mesh.size() > 1:
        reduction_groups(mesh)
    _reducers[module] = Reducer(module)


set_reducer(attach)


@contextmanager
def no_sync(module: torch.nn.Module) -> Iterator[None]:
    """Within: backward accumulates gradients without summing them over the ranks.

    The next backward outside sums everything accumulated so far. Raises `ValueError` for a module that is not
    parallelized.
    """
    if module not in _reducers:
        raise ValueError(f"no_sync: {type(module).__name__} is not a module that mw.parallelize returned")
    reducer = _reducers[module]
    before, reducer.enabled = reducer.enabled, False
    try:
        yield
    finally:
        reducer.enabled = before
