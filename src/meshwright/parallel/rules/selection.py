"""Order statistics over everything: the k-th smallest of all elements of a split tensor, without moving an element.

Radix selection: floating numbers are read as whole numbers of the same order; from the highest byte to the lowest,
the ranks add up how many candidates have each value of the byte, and keep those of the byte in which the k-th lies.
256 counts are sent per byte of the dtype, whatever the size of the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.comm import Cause, all_reduce
from meshwright.parallel.functions import cause_for, function, placements_of
from meshwright.parallel.layout import replicated, split_axes
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.parts import to_local
from meshwright.parallel.tensor import is_mesh, wrap

aten = torch.ops.aten
_BYTE = 256
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of the floating ones (of which -0 comes before 0)."""
    whole = values.view(_INTEGERS[values.dtype])
    top = torch.iinfo(whole.dtype).max
    return torch.where(whole < 0, whole ^ top, whole).long()


def _from_order(key: int, dtype: torch.dtype) -> torch.Tensor:
    whole = _INTEGERS[dtype]
    value = torch.tensor(key, dtype=whole)
    return torch.where(value < 0, value ^ torch.iinfo(whole).max, value).view(dtype)


class Selection:
    """The elements of mesh tensor `x` that are numbers, over all ranks."""

    def __init__(self, local: torch.Tensor, mesh: DeviceMesh, axes: tuple[int, ...], cause: Cause) -> None:
        self._dtype = local.dtype
        flat = local.detach().reshape(-1)
        flat = flat if flat.dtype in _INTEGERS else flat.float()
        bad = flat.isnan()
        self._wide, self._sum = flat.dtype, lambda counts: all_reduce(counts, mesh, axes, cause)
        self._keys = _in_order(flat[~bad])
        numbers, others = self._sum(torch.stack([bad.logical_not().sum(), bad.sum()])).tolist()
        self.count, self.has_nan = int(numbers), bool(others)

    def smallest(self, k: int) -> torch.Tensor:
        """The element at position `k` of all elements in ascending order; a plain scalar, equal on all ranks."""
        keys, found = self._keys, 0
        bits = torch.iinfo(_INTEGERS[self._wide]).bits
        for shift in range(bits - 8, -1, -8):
            digits = keys >> shift  # the highest byte keeps the sign
            digits = digits + _BYTE // 2 if shift == bits - 8 else digits & (_BYTE - 1)
            ends = self._sum(torch.bincount(digits, minlength=_BYTE)).cumsum(0)
            digit = int((ends <= k).sum())
            k -= int(ends[digit - 1]) if digit else 0
            keys = keys[digits == digit]
            found = found * _BYTE + (digit - _BYTE // 2 if shift == bits - 8 else digit)
        return _from_order(found, self._wide).to(device=self._keys.device, dtype=self._dtype)


@operator(aten.median.default, aten.nanmedian.default)
def median(func: Any, args: Any, kwargs: Any) -> Any:
    """The lower median of all elements; backward is elementwise."""
    (x,) = args
    axes = split_axes(placements_of(x))
    if not axes or not x.is_floating_point() or not x.numel():
        return NotImplemented
    mesh = x._spec.mesh
    chosen = Selection(x._local_tensor, mesh, axes, cause_of(func, args))
    if not chosen.count or (chosen.has_nan and func is aten.median.default):
        value = x._local_tensor.new_full((), torch.nan)
    else:
        value = chosen.smallest((chosen.count - 1) // 2)
    return wrap(value, mesh, replicated(mesh), None, x._ledger)


def _quantile(x: Any, q: Any, dim: Any, keepdim: bool, interpolation: str, skip_nan: bool) -> Any:
    differentiable = torch.is_grad_enabled() and (x.requires_grad or getattr(q, "requires_grad", False))
    if not is_mesh(x) or is_mesh(q) or dim is not None or differentiable or x.dtype not in _INTEGERS or not x.numel():
        return NotImplemented
    axes, mesh, cause = split_axes(placements_of(x)), x._spec.mesh, cause_for("quantile", x)
    if not axes:
        return NotImplemented
    local = to_local(x).detach()
    wanted = q if isinstance(q, torch.Tensor) else torch.tensor(q, dtype=x.dtype)
    if wanted.dtype != x.dtype or wanted.ndim > 1 or not bool(((wanted >= 0) & (wanted <= 1)).all()):
        return NotImplemented  # torch says what is wrong
    chosen = Selection(local, mesh, axes, cause)
    if not chosen.count or (chosen.has_nan and not skip_nan):
        out = local.new_full(wanted.shape, torch.nan)
    else:
        found = [_between(chosen, float(p), interpolation, x.dtype) for p in wanted.reshape(-1)]
        out = torch.stack(found).reshape(wanted.shape) if found else local.new_empty(wanted.shape)
    if keepdim:
        out = out.reshape(*wanted.shape, *[1] * x.ndim)
    return wrap(out, mesh, replicated(mesh), None, x._ledger)


def _between(chosen: Selection, p: float, interpolation: str, dtype: torch.dtype) -> torch.Tensor:
    """One quantile, with torch's arithmetic."""
    rank = torch.tensor(p, dtype=dtype) * (chosen.count - 1)
    if interpolation in ("lower", "higher", "nearest"):
        rank = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}[interpolation](rank)
    below, above = int(rank), int(rank.ceil())
    value = chosen.smallest(below)
    if above == below:
        return value
    weight = torch.tensor(0.5, dtype=dtype) if interpolation == "midpoint" else rank - below
    return torch.lerp(value, chosen.smallest(above), weight.to(value.device))


@function(torch.quantile, torch.Tensor.quantile)
def quantile(input: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear") -> Any:
    """Quantiles of all elements where no gradient is asked for; others are sorted along dims."""
    return _quantile(input, q, dim, keepdim, interpolation, skip_nan=False)


@function(torch.nanquantile, torch.Tensor.nanquantile)
def nanquantile(input: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear") -> Any:
    """The same over what is a number."""
    return _quantile(input, q, dim, keepdim, interpolation, skip_nan=True)
