"""Views that had to be copied, because a split dim was cut, and yet behave as views.

On one device a slice shares memory with its base. Here `x[:, :, 1:]` of a split dim is fetched from neighbours, so it
is a copy that remembers where it comes from: a write to it goes home to the base, and a read after the base (or
another view of it) was written fetches anew. Staleness is seen by torch's own version counter, which views share with
their base; all ranks count alike, so all of them fetch or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import layer
from meshwright.parallel.tensor import is_mesh, version, wrap

Writer = Callable[["Copied", Any], None]
WRITERS: dict[Any, Writer] = {}  # view operator -> how the copy it made goes home to `base` (a mesh tensor)
_inference_writes = [0]  # inference tensors have no version counter: any write makes all their copies stale


def writer(*funcs: Any) -> Callable[[Writer], Writer]:
    """Register how copies made by view operators are written back."""

    def register(write: Writer) -> Writer:
        for func in funcs:
            WRITERS[func] = write
        return write

    return register


def set_runner(run: Callable[..., Any]) -> None:
    """Install what runs the rules (done once, by `operators.py`)."""
    global _run
    _run = run


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    raise AssertionError("no rules yet")


def writes_of(t: Any) -> int:
    """The number of writes so far to the memory that `t` views."""
    return -1 - _inference_writes[0] if t.is_inference() else version(t)


class Copied:
    """Where a copy comes from: `func(base, *args)`, entry `pick` of the result if there are several."""

    def __init__(self, base: Any, out: Any, func: Any, args: Any, kwargs: Any, pick: int | None) -> None:
        # parts and specs, not the handles: those would keep their graphs alive in a cycle
        self._base = base._local_tensor, base._spec, base._ledger
        self._above: Copied | None = base._source
        self._out = out._spec
        self.local: torch.Tensor = out._local_tensor
        self.func, self.args, self.kwargs, self.pick = func, args, kwargs, pick
        self.seen = writes_of(base)

    def base(self) -> Any:
        """The base under a handle without history."""
        local, spec, ledger = self._base
        return wrap(local, spec.mesh, tuple(spec.placements), tuple(spec.shape), ledger)

    def copy(self) -> Any:
        """The copy under a handle without history."""
        return wrap(self.local, self._out.mesh, tuple(self._out.placements), tuple(self._out.shape), self._base[2])

    def refresh(self, t: Any) -> None:
        """Fetch anew if anything was written since; collective. `t` is the copy or a view of it."""
        now = writes_of(t)
        if self.seen != now:
            self._again(now)

    def _again(self, now: int) -> None:
        if self._above is not None and self._above.seen != now:
            self._above._again(now)
        with torch.no_grad():
            out = _run(self.func, (self.base(), *self.args), self.kwargs)
            self.local.copy_((out if self.pick is None else out[self.pick])._local_tensor)
        if not self.local.is_inference():
            torch.autograd.graph.increment_version(self.local)
        self.seen = now

    def write(self, after: int) -> None:
        """Bring the copy home to the base, and that to its own; collective. `after`: the version to come."""
        WRITERS[self.func](self, self.base())
        if self._above is not None:
            self._above.write(after)
        self.seen = after


def remember(result: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Note for each copy that a view operator made of `args[0]` where it comes from; views of copies are copies."""
    base = args[0]
    several = isinstance(result, list | tuple)
    for pick, t in enumerate(result if several else [result]):
        if not is_mesh(t) or t._source is not None:
            continue
        if t._frozen_view:
            t._source = Copied(base, t, func, args[1:], kwargs, pick if several else None)
        elif base._frozen_view:
            t._frozen_view, t._source = True, base._source


def check_writable(func: Any, t: Any) -> None:
    """Raise `UnsupportedError` if a write to this copy cannot reach its base."""
    source = t._source
    while source is not None and source.func in WRITERS:
        source = source._above
        if source is None:
            return
    raise UnsupportedError(
        f"{func} in layer {layer()!r} writes in place to a view that had to be copied, because a split dim "
        "was cut; on one device the base would change too. Write to the base, or clone() the view first."
    )


def written(t: Any, changes_shape: bool) -> None:
    """After a write to mesh tensor `t`: versions go on, and a copy goes home. Collective if `t` is a copy."""
    if t._local_tensor.is_inference():
        _inference_writes[0] += 1
    else:  # the rules write below autograd, which then cannot see it
        torch._C._increment_version((t._local_tensor,))
        with torch._C.DisableTorchFunctionSubclass():
            base = t._base
        if base is not None:  # the part of a view was cut out below autograd, too: it counts for itself
            torch.autograd.graph.increment_version(base._local_tensor)
        for other in (t, base):
            if other is not None and other._keeper is not None and torch.is_grad_enabled():  # its graph goes on
                other._keeper.hand_over()
    if changes_shape:
        t._history = None
    if t._frozen_view and t._source is not None and not changes_shape:
        # torch counts a write after it is done
        t._source.write(writes_of(t) + (0 if t.is_inference() else 1))
