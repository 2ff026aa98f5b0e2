"""The entrances of backward. A checkpoint recomputes inside backward, and its functions must reach the rules again.

Functions without a rule run with the routing of functions switched off, which must not hold for backward: a
convolution that a checkpoint repeats would miss its rule. So the entrances go on with `GradientEdge`s, which torch
does not route, and the switch stays on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshwright.parallel.functions import as_mesh, function
from meshwright.parallel.history import EDGE, Keeper, as_gradient, history, node_of, observed, stand_alone
from meshwright.parallel.parts import from_local, to_local
from meshwright.parallel.redistribute import redistribute, same
from meshwright.parallel.tensor import is_mesh, wrap


def _tuple(values: Any) -> tuple[Any, ...]:
    """One value, several, or none, as a tuple. (A GradientEdge is a tuple itself.)"""
    if values is None:
        return ()
    if isinstance(values, Mapping):
        return tuple(values.values())
    single = isinstance(values, torch.Tensor | GradientEdge)
    return (values,) if single or not isinstance(values, Iterable) else tuple(values)


def _edge(value: Any) -> Any:
    """Where the gradient of a tensor is complete."""
    part = observed(value) if is_mesh(value) and not value.is_leaf else None
    return get_gradient_edge(value if part is None else part) if isinstance(value, torch.Tensor) else value


def _edges(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where backward starts: at the mesh tensors themselves, for so are the gradients it starts from."""
    return tuple(
        GradientEdge(node_of(v), 0)
        if is_mesh(v) and history(v) is not None
        else (get_gradient_edge(v) if isinstance(v, torch.Tensor) else v)
        for v in values
    )


def _gradient(found: Any, of: Any) -> Any:
    """The gradient of what was asked for: of a part, as that of its mesh tensor."""
    if found is None or is_mesh(found):
        return found
    place = (of._spec, of._ledger) if is_mesh(of) else None
    if isinstance(of, GradientEdge):
        known: Any = of.node.metadata
        place = known.get((EDGE, of.output_nr))
    return found if place is None else as_gradient(found, *place)


def _start(outputs: tuple[Any, ...], grads: Any) -> tuple[Any, ...]:
    """The gradients to start from; of a scalar mesh tensor it is a mesh tensor of 1."""
    given = _tuple(grads) or (None,) * len(outputs)
    return tuple(
        torch.ones_like(out)
        if grad is None and isinstance(out, torch.Tensor) and out.numel() == 1
        else (as_mesh(grad, out._spec.mesh) if is_mesh(out) else grad)
        for out, grad in zip(outputs, given, strict=True)
    )


@function(torch.autograd.backward)
def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """`torch.autograd.backward`."""
    outputs, wanted = _tuple(tensors), None if inputs is None else _tuple(inputs)
    for x in wanted or ():
        if isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf:
            x.retain_grad()  # as torch does, which here sees an edge alone
    torch.autograd.backward(
        _edges(outputs),
        _start(outputs, grad_tensors),
        retain_graph,
        create_graph,
        inputs=None if wanted is None else tuple(_edge(x) for x in wanted),
    )


@function(torch.Tensor.backward)
def tensor_backward(
    self: Any, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """`loss.backward()`."""
    backward(self, gradient, retain_graph, create_graph, inputs=inputs)


@function(torch.autograd.grad)
def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """`torch.autograd.grad`."""
    outputs, wanted = _tuple(outputs), _tuple(inputs)
    if is_grads_batched:
        options = (retain_graph, create_graph, only_inputs, allow_unused, False, materialize_grads)
        return _batched(outputs, wanted, _tuple(grad_outputs), options)
    found = torch.autograd.grad(
        _edges(outputs),
        tuple(_edge(v) for v in wanted),
        _start(outputs, grad_outputs),
        retain_graph,
        create_graph,
        allow_unused=True if materialize_grads else allow_unused,
    )
    found = tuple(_gradient(g, x) for g, x in zip(found, wanted, strict=True))
    if not materialize_grads:
        return found
    return tuple(
        torch.zeros_like(x, requires_grad=create_graph) if g is None else g for g, x in zip(found, wanted, strict=True)
    )


def _batched(outputs: tuple[Any, ...], wanted: tuple[Any, ...], batches: tuple[Any, ...], options: Any) -> Any:
    """A gradient for each entry of the first dim of `batches`: one after the other, since `vmap` knows no mesh."""
    keep, *rest = options
    count = len(batches[0])
    rows = [
        grad(outputs, wanted, tuple(b[i] for b in batches), True if i < count - 1 else keep, *rest)
        for i in range(count)
    ]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))


@function(torch.Tensor.detach_, torch.detach_)
def detach_(self: Any) -> Any:
    """Leaves the graph, and so does what rules would go on from."""
    stand_alone(self)
    return NotImplemented


@function(torch.Tensor.register_hook)
def register_hook(self: Any, hook: Any) -> Any:
    """A hook on a tensor that rules went on from directly: on its part, where all of its gradient passes."""
    part = observed(self)
    if part is None:
        return NotImplemented
    spec, ledger = self._spec, self._ledger
    mesh, placements, shape = spec.mesh, tuple(spec.placements), tuple(spec.shape)

    def on_part(grad: torch.Tensor) -> torch.Tensor | None:
        place = mesh, placements, shape, ledger
        changed = hook(from_local(grad, *place) if torch.is_grad_enabled() else wrap(same(grad), *place))
        return None if changed is None else to_local(redistribute(as_mesh(changed, mesh), placements))

    return part.register_hook(on_part)


@function(torch.Tensor.retain_grad)
def retain_grad(self: Any) -> Any:
    """`.grad` is that of the part, if rules went on from there. The tensor keeps its own for when it is written."""
    part = observed(self)
    if part is not None and self._keeper is None:
        self._keeper = Keeper(self, part)
    return NotImplemented
