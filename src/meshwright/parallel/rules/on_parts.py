"""Elementwise functions between rules that go on from the parts themselves: torch's own function, and its own graph.

Where every operand is a mesh tensor that a rule has just made, or a number, and all lie alike, the function
runs on the plain parts, and its backward needs no rule at all. Everything else takes the way of all operators.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.at_once import at_once
from meshwright.parallel.functions import function
from meshwright.parallel.history import direct
from meshwright.parallel.parts import from_local_alike, written
from meshwright.parallel.tensor import MeshOps, is_mesh

_UNARY = "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign sigmoid logsigmoid tanh hardtanh"
_UNARY += " hardswish hardsigmoid tanhshrink neg abs exp log sqrt rsqrt square"
_BINARY = "add sub mul div true_divide pow"
_SPECIAL = "__neg__ __abs__ __rsub__ __rdiv__ __rtruediv__ __pow__"


def _functions() -> dict[Any, None]:
    """Every spelling of them, in place too."""
    names = [name + end for name in f"{_UNARY} {_BINARY}".split() for end in ("", "_")]
    found = [getattr(place, name, None) for name in names for place in (torch, F, torch.Tensor)]
    found += [getattr(torch.Tensor, name) for name in _SPECIAL.split()]
    return dict.fromkeys(f for f in found if f is not None)


def _place_of_inplace(func: Callable[..., Any]) -> int:
    """How many arguments may come before a positional `inplace`."""
    try:
        names = list(inspect.signature(func).parameters)
    except ValueError:  # built in
        names = []
    return names.index("inplace") if "inplace" in names else sys.maxsize


def _rule(func: Callable[..., Any]) -> Callable[..., Any]:
    writes = func.__name__.endswith("_") and not func.__name__.startswith("_")
    place = _place_of_inplace(func)

    def rule(*args: Any, **kwargs: Any) -> Any:
        """On the parts where rules made all operands, else as any elementwise operator."""
        if not torch.is_grad_enabled() or (writes and _is_aside(args)):
            return _unrecorded(func, args, kwargs) if writes else NotImplemented
        first: Any = None
        parts = []
        for value in args:
            if isinstance(value, MeshOps):
                part = direct(value)
                if part is None or (first is not None and value._spec is not first._spec):
                    return NotImplemented
                first = value if first is None else first
                parts.append(part)
            elif isinstance(value, torch.Tensor):
                return NotImplemented
            else:
                parts.append(value)
        if first is None or (kwargs and any(isinstance(v, torch.Tensor) for v in kwargs.values())):
            return NotImplemented
        if len(args) > place:
            return NotImplemented
        if writes or kwargs.get("inplace"):
            return _written(func, args[0], parts, kwargs)
        return from_local_alike(func(*parts, **kwargs), first)

    return rule


def _is_aside(args: Any) -> bool:
    """Whether a write concerns no graph, as that to a counter of batches."""
    if not isinstance(args[0], MeshOps) or args[0]._history is not None:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        for value in args:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                return False
    return True


def _unrecorded(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """In place where no graph is kept, as optimisers write: at half the cost of the way of operators."""
    result = at_once(func, args, kwargs, True, False)
    if result is not NotImplemented and not result._local_tensor.is_inference():
        torch._C._increment_version((result,))  # as torch counts a write to the mesh tensor
    return result


def _written(func: Callable[..., Any], x: Any, parts: list[Any], kwargs: Any) -> Any:
    """In place: the part is written, and its graph goes on."""
    if not is_mesh(x) or parts[0]._is_view():  # torch would have to see that the base is written
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        if x.retains_grad:  # a gradient that would have to come along
            return NotImplemented
    func(*parts, **kwargs)
    return written(x, parts[0])


for _func in _functions():
    function(_func)(_rule(_func))
