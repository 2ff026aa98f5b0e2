"""Between two rules: the plain part that one has made, from which the next goes on, with torch's own graph behind it.

A mesh tensor has a node of its own in the graph, which leads to the part. Rules that go on from the part leave it out,
forward and backward; all gradients meet at the part. So whoever looks at the graph before that (a hook, a node, a
gradient to be retained) has all others pass the node from then on; whoever comes later looks at the part.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.parallel.account import Ledger

EDGE = "meshwright"  # in the metadata of a node, with the number of an output: the mesh tensor around it
_grad_fn: Any = torch._C.TensorBase.__dict__["grad_fn"].__get__


def history(x: Any) -> torch.Tensor | None:
    """The plain part from which `from_local` made `x`, with the graph behind it, unless the graph of `x` went on since.

    All gradients meet there, also those that come by the node of `x` itself.
    """
    held = x._history
    if held is None:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return held[0] if _grad_fn(x) is held[1] else None


def direct(x: Any) -> torch.Tensor | None:
    """The history, for a rule to go on from: that leaves the node between part and mesh tensor out, there and back.
    None if there is none, or if somebody has looked at that node, which all that follows has to pass."""
    if x._history is None or x._way == "node":
        return None
    part = history(x)
    if part is not None:
        x._way = "part"
    return part


def observed(x: Any) -> torch.Tensor | None:
    """Where whoever looks at the graph of `x` finds all of its gradient: at the part, if rules went on from there, else
    (None) at `x` itself, which everybody passes from now on."""
    if x._way == "part":
        return history(x)
    x._way = "node"
    return None


def stand_alone(x: Any) -> None:
    """`x` leaves its history, with what that has kept for it."""
    if x._keeper is not None:
        x._keeper.hand_over()
    x._history = None


def node_of(x: Any) -> Any:
    """The node that made the mesh tensor itself."""
    with torch._C.DisableTorchFunctionSubclass():
        return _grad_fn(x)


def as_gradient(part: torch.Tensor, spec: DTensorSpec, ledger: Ledger | None) -> Any:
    """The gradient of a part, as that of the mesh tensor around it."""
    from meshwright.parallel.parts import from_local
    from meshwright.parallel.tensor import wrap

    place = spec.mesh, tuple(spec.placements), tuple(spec.shape), ledger
    return from_local(part, *place) if part.requires_grad else wrap(part, *place)


class Keeper:
    """The gradient of a mesh tensor, retained on its part: torch keeps it there after all hooks."""

    def __init__(self, x: Any, part: torch.Tensor) -> None:
        self._x, self._part = weakref.ref(x), part
        self._shown: tuple[torch.Tensor, Any] | None = None  # what the part holds, and that as a mesh tensor
        part.retain_grad()

    def gradient(self) -> Any:
        """As a mesh tensor, the same until another backward."""
        x, grad = self._x(), self._part.grad
        if grad is None or x is None:
            return None
        if self._shown is None or self._shown[0] is not grad:
            self._shown = grad, as_gradient(grad, x._spec, x._ledger)
        return self._shown[1]

    def set(self, value: Any) -> None:
        """Another one, or none."""
        from meshwright.parallel.functions import as_mesh
        from meshwright.parallel.redistribute import redistribute

        x = self._x()
        if value is not None and x is not None:
            value = redistribute(as_mesh(value, x._spec.mesh), tuple(x._spec.placements))._local_tensor
        self._part.grad = value

    def hand_over(self) -> None:
        """The tensor has its gradient itself from now on; what its own node brought is in it."""
        x, grad = self._x(), self.gradient()
        self._part.grad = None
        if x is not None:
            x._keeper = None
            x.grad = grad
