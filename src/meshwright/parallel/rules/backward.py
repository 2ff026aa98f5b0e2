"""The entrances of backward. A checkpoint recomputes inside backward, and its functions must reach the rules again.

Functions without a rule run with the routing of functions switched off, which must not hold for backward: a
convolution that a checkpoint repeats would miss its rule. So the entrances go on with `GradientEdge`s, which torch
does not route, and the switch stays on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from meshwright.parallel.functions import as_mesh, function
from meshwright.parallel.tensor import is_mesh


def _tuple(values: Any) -> tuple[Any, ...]:
    """One value, several, or none, as a tuple. (A GradientEdge is a tuple itself.)"""
    if values is None:
        return ()
    if isinstance(values, Mapping):
        return tuple(values.values())
    single = isinstance(values, torch.Tensor | torch.autograd.graph.GradientEdge)
    return (values,) if single or not isinstance(values, Iterable) else tuple(values)


def _edges(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(get_gradient_edge(v) if isinstance(v, torch.Tensor) else v for v in values)


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
    outputs = _tuple(tensors)
    torch.autograd.backward(
        _edges(outputs),
        _start(outputs, grad_tensors),
        retain_graph,
        create_graph,
        inputs=None if inputs is None else _edges(_tuple(inputs)),
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
        _edges(wanted),
        _start(outputs, grad_outputs),
        retain_graph,
        create_graph,
        allow_unused=True if materialize_grads else allow_unused,
    )
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
