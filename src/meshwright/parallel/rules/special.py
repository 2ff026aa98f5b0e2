"""Tensor methods that must not reach torch's plain implementation: data, copies, pickling."""

from __future__ import annotations

import copy
from typing import Any

import torch

from meshwright.errors import UnsupportedError
from meshwright.parallel.functions import function
from meshwright.parallel.history import stand_alone
from meshwright.parallel.tensor import MeshParameter, is_mesh, wrap

_DATA: Any = torch.Tensor.data


@function(_DATA.__get__)
def get_data(x: Any) -> Any:
    """`x.data`: the same memory without history."""
    return x.detach()


@function(_DATA.__set__)
def set_data(x: Any, value: Any) -> None:
    """`p.data = value` (also `module.to(dtype)`): the local part and the layout follow."""
    if not is_mesh(x) or not is_mesh(value):
        raise UnsupportedError(
            "assigning .data between a plain and a mesh tensor: "
            "use p.copy_(value) under no_grad, which keeps the layout"
        )
    stand_alone(x)
    with torch._C.DisableTorchFunctionSubclass():
        _DATA.__set__(x, value)
    x._local_tensor, x._spec = value._local_tensor, value._spec


def parameter_like(x: Any, local: torch.Tensor) -> Any:
    """A new parameter (or buffer) object with the layout of `x` around `local`."""
    spec = x._spec
    new = torch.Tensor._make_wrapper_subclass(
        MeshParameter,
        tuple(spec.shape),
        strides=spec.tensor_meta.stride,
        dtype=local.dtype,
        device=local.device,
        requires_grad=x.requires_grad,
    )
    new.__dict__.update({key: value for key, value in x.__dict__.items() if key != "_ledger"})
    new.__dict__.update(_local_tensor=local, _spec=spec, _ledger=x._ledger)
    return new


@function(torch.Tensor.__deepcopy__)
def deepcopy(x: Any, memo: dict[int, Any]) -> Any:
    """A copy with memory of its own; the mesh is shared, the record of the module is copied with the module."""
    if id(x) in memo:
        return memo[id(x)]
    if not x.is_leaf:
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol at the moment")
    local = x._local_tensor.detach().clone()
    if type(x) is MeshParameter:
        new = parameter_like(x, local)
    else:
        new = wrap(local, x._spec.mesh, tuple(x._spec.placements), tuple(x._spec.shape), x._ledger)
        new.requires_grad_(x.requires_grad)
    memo[id(x)] = new
    if x._ledger is not None:
        new._ledger = copy.deepcopy(x._ledger, memo)
    if x.grad is not None:
        new.grad = deepcopy(x.grad, memo)
    return new


@function(torch.Tensor.__reduce_ex__)
def reduce_ex(x: Any, protocol: Any) -> Any:
    """Pickling is refused: a mesh lives in this job alone."""
    raise UnsupportedError(
        "a mesh tensor cannot be pickled (torch.save, a result of mw.launch): take x.full_tensor() "
        "on every rank first, or x.to_local() for this rank's part"
    )
