"""Parameter gradients: summed over the ranks in buckets while backward still runs, complete when it returns.

A parameter that ranks used on different data has a gradient in summands (Partial). Buckets hold parameters in the
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
from torch.distributed.tensor import Shard
from torch.utils.weak import WeakIdKeyDictionary

from meshwright.errors import ExchangeError, MeshwrightError, UnsupportedError
from meshwright.parallel.account import totals
from meshwright.parallel.apply import set_reducer
from meshwright.parallel.collective import Sum, SumQueue, summed_bytes
from meshwright.parallel.layout import PARTIAL, REPLICATE, owned, partial_axes, splits
from meshwright.parallel.mesh import SUMS_LANE, reduction_groups, sizes
from meshwright.parallel.tensor import is_mesh, spec_of, version
from meshwright.plan.exchange import buckets
from meshwright.sync.memory import in_order, is_alone, line_of, shaped
from meshwright.sync.order import Run, Sums, sums_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Flight:
    """Gradients of one bucket with the same axes and dtype, on their way."""

    def __init__(self, parameters: list[Any], axes: tuple[int, ...]) -> None:
        self.parameters, self.axes = parameters, axes
        grads = [p.grad for p in parameters]
        self.mesh = grads[0]._spec.mesh
        alone = [is_alone(grad) for grad in grads]
        self.held = [(grad, grad._local_tensor, version(grad)) for grad in grads]
        # In the memory order of the parameters, which is the same on all ranks: that of gradients depends on the
        # kernels that a rank's part got.
        self.parts = [in_order(p, held) for p, (_, held, _) in zip(parameters, self.held, strict=True)]
        lines = [line_of(part) for part in self.parts]
        # Sums in the memory of their summands, where nobody else sees it: fresh memory costs more than the sum.
        out = [
            line if is_ours or part is not held else torch.empty_like(line)
            for line, is_ours, part, (_, held, _) in zip(lines, alone, self.parts, self.held, strict=True)
        ]
        world, own_mesh = reduction_groups(self.mesh)
        if len(axes) == self.mesh.ndim:  # every rank of the job: one all-reduce instead of one per axis
            self.stages = [(world, self.mesh.size())]
        else:
            self.stages = [(own_mesh.get_group(axis), sizes(self.mesh)[axis]) for axis in axes]
        self.work = self._start(lines, out, *self.stages[0])

    def _start(
        self, parts: Sequence[torch.Tensor], out: Sequence[torch.Tensor], pg: dist.ProcessGroup, ranks: int
    ) -> Sum:
        nbytes = summed_bytes(sum(part.numel() * part.element_size() for part in parts), ranks)
        totals.sent_bytes += nbytes
        totals.reduced_bytes += nbytes
        totals.messages += 1
        return Sum(parts, pg, lane=SUMS_LANE, out=out)

    def land(self, queue: SumQueue) -> list[tuple[int, ...]]:
        """Wait, and give every parameter its sum, but those of the shapes returned: a hook changed their gradients."""
        self.work.wait()
        for stage in self.stages[1:]:
            self.work = self._start(self.work.results, self.work.results, *stage)
            queue.add(self.work)  # other modules have sums on this axis, too
            queue.fold([self.work])
            self.work.wait()
        changed = []
        given = zip(self.parameters, self.held, self.parts, self.work.results, strict=True)
        for p, (grad, held, before), part, total in given:
            if p.grad is not grad or grad._local_tensor is not held or version(grad) != before:
                changed.append(tuple(p.shape))
                continue
            placements = tuple(
                REPLICATE if axis in self.axes else place for axis, place in enumerate(grad._spec.placements)
            )
            shape = tuple(grad._spec.shape)
            grad._spec = spec_of(self.mesh, placements, shape, grad._spec.tensor_meta.stride, part.dtype)
            local = part if total.data_ptr() == part.data_ptr() else shaped(total, part)
            if local.stride() != held.stride():  # the same numbers in the strides that the gradient had
                local = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device).copy_(
                    local
                )
            grad._local_tensor = local
        return changed


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


def _as_summand(grad: Any) -> None:
    """A gradient that came split (of a weight as wide as the activation) as a summand: zeros where others own it."""
    spec = grad._spec
    placements = tuple(spec.placements)
    if not splits(placements):
        return
    shape = tuple(spec.shape)
    whole = grad._local_tensor.new_zeros(shape)
    part = whole
    for _, dim in splits(placements):
        span = owned(spec.mesh, placements, dim, shape[dim])
        part = part.narrow(dim, span.lo, span.size)
    part.copy_(grad._local_tensor)
    held = tuple(PARTIAL if isinstance(p, Shard) else p for p in placements)
    grad._local_tensor = whole
    grad._spec = spec_of(spec.mesh, held, shape, tuple(whole.stride()), whole.dtype)


def _living(bucket: list[weakref.ref[Any]]) -> list[Any]:
    return [p for p in (ref() for ref in bucket) if p is not None]


class Reducer:
    """The bucketed reduction of one parallelized module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.enabled = True
        # Weak: the parameters' hooks hold the reducer, and a cycle through a hook is never collected.
        self._buckets: list[list[weakref.ref[Any]]] = []
        self._place: Any = WeakIdKeyDictionary()  # parameter -> its bucket
        self._reset()
        self.adopt(module)

    def adopt(self, module: torch.nn.Module) -> None:
        """Take in parameters that are trained and not known yet: all at first, later those that were unfrozen."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint recomputes within a backward whose buckets are under way
        with torch._C.DisableTorchFunctionSubclass():  # what is asked here needs no rule, in every forward
            found: list[Any] = [
                p
                for p in module.parameters()
                if p.requires_grad
                and p not in self._place
                and is_mesh(p)
                and p._spec.mesh.size() > 1  # alone there is nothing to sum
                # not what `functional_call` puts in their place for one call
                and isinstance(p, torch.nn.Parameter)
                and p.is_leaf
            ]
        first = len(self._buckets)
        places = buckets([p._local_tensor.numel() * p._local_tensor.element_size() for p in found])
        self._buckets += [[] for _ in range(max(places, default=-1) + 1)]
        for p, place in reversed(list(zip(found, places, strict=True))):
            self._buckets[first + place].append(weakref.ref(p))
            self._place[p] = first + place
            p.register_post_accumulate_grad_hook(self._ready)
        if found:
            self._reset()

    def _reset(self) -> None:
        self._missing = [{id(p) for p in _living(bucket)} for bucket in self._buckets]
        self._started = 0
        self._flights: list[_Flight] = []
        self._sums: Sums | None = None
        self._run: weakref.ref[Run] | None = None

    def _begin(self, mesh: Any) -> Sums:
        """What this backward's sums are added to. Where the one before raised, its callback and run never came."""
        if self._sums is None or self._run is None or self._run() is None:
            self._reset()
            sums = sums_on(mesh)
            run = sums.begin()
            Variable._execution_engine.queue_callback(partial(self._finish, sums, run))
            self._sums, self._run = sums, weakref.ref(run)
        return self._sums

    def _ready(self, p: Any) -> None:
        if not self.enabled:
            return
        sums = self._begin(p._spec.mesh)
        place = self._place[p]
        if place < self._started:
            raise UnsupportedError(
                "a gradient was accumulated again after its sum had started (a parameter used in several reentrant "
                "checkpoints); use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        self._missing[place].discard(id(p))
        while self._started < len(self._buckets) and not self._missing[self._started]:
            self._start_next(sums)

    def _start_next(self, sums: Sums) -> None:
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for p in _living(self._buckets[self._started]):
            grad = p.grad
            if grad is None:
                continue
            _as_summand(grad)
            axes = partial_axes(tuple(grad._spec.placements))
            if axes:
                groups.setdefault((axes, grad._local_tensor.dtype), []).append(p)
        for (axes, _), parameters in groups.items():
            with _named():
                self._flights.append(_Flight(parameters, axes))
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
