"""Fourier transforms over split dims: the split moves to a dim that is not transformed, and back (all-to-all).

Where there is no such dim for all splits at once, one dim is transformed after the other.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.copies import Copied, writer
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.rules.aside import aside, home, run_aside, whole_dims
from meshwright.parallel.rules.dimwise import resized
from meshwright.parallel.tensor import wrap

aten = torch.ops.aten


def like(local: torch.Tensor, x: Any, frozen_view: bool) -> Any:
    """`local` placed as `x`; `frozen_view`: what one device holds as a view."""
    spec = x._spec
    return wrap(local, spec.mesh, tuple(spec.placements), tuple(spec.shape), x._ledger, frozen_view=frozen_view)


def _local(func: Any, args: Any, kwargs: Any) -> Any:
    local = args[0]._local_tensor
    if local.numel():
        return resized(func(local, *args[1:], **kwargs), args[0])
    out = func(local.new_zeros([max(1, size) for size in local.shape]), *args[1:], **kwargs)  # for the sizes alone
    empty = [dim for dim, size in enumerate(local.shape) if size == 0 and dim not in args[1]]
    for dim in empty:
        out = out.narrow(dim, 0, 0)
    return resized(out, args[0])


def _c2c(x: Any, dims: list[int], norm: int, forward: bool) -> Any:
    """Complex to complex along dims, of which each can be transformed alone."""
    for dim in dims:
        out = run_aside(_local, dim, aten._fft_c2c.default, (x, [dim], norm, forward), {})
        if out is NotImplemented:
            return NotImplemented
        x = out
    return x


@operator(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
def transform(func: Any, args: Any, kwargs: Any) -> Any:
    """Transforms of complex and of real tensors. `args[1]` are the dims; that of halved size is the last of them."""
    x, dims = args[0], [dim % args[0].ndim for dim in args[1]]
    if whole_dims(x, dims):
        return _local(func, args, kwargs)
    cause, placements = cause_of(func, args), tuple(x._spec.placements)
    moved = aside(x, dims, cause)
    if moved is not None:
        return home(_local(func, (moved, *args[1:]), kwargs), placements, cause)
    if func is aten._fft_c2c.default:
        return _c2c(x, dims, args[2], args[3])
    if aside(x, dims[-1:], cause) is None:
        return NotImplemented
    if func is aten._fft_c2r.default:
        inner = _c2c(x, dims[:-1], args[2], False)
        if inner is NotImplemented:
            return inner
        return run_aside(_local, dims[-1], func, (inner, dims[-1:], *args[2:]), kwargs)
    if not args[3]:  # two-sided: mirrored values of all dims at once
        return NotImplemented
    half = run_aside(_local, dims[-1], func, (x, dims[-1:], *args[2:]), kwargs)
    return _c2c(half, dims[:-1], args[2], True)


@operator(aten._conj.default, aten._conj_physical.default)
def conjugate(func: Any, args: Any, kwargs: Any) -> Any:
    """Conjugated in memory: the lazy form of one device is a flag that no exchange would see."""
    return like(torch.conj_physical(args[0]._local_tensor), args[0], frozen_view=func is aten._conj.default)


@operator(aten._neg_view.default)
def negative_view(func: Any, args: Any, kwargs: Any) -> Any:
    """Negated in memory, for the same reason."""
    return like(-args[0]._local_tensor, args[0], frozen_view=True)


@writer(aten._conj.default)
def write_conjugate(source: Copied, base: Any) -> None:
    """The base holds the conjugate of what was written."""
    base._local_tensor.copy_(torch.conj_physical(source.local))


@writer(aten._neg_view.default)
def write_negative(source: Copied, base: Any) -> None:
    """The base holds the negative of what was written."""
    base._local_tensor.copy_(-source.local)


@operator(aten.view_as_real.default)
def as_real(func: Any, args: Any, kwargs: Any) -> Any:
    """A new last dim of size 2; the splits stay."""
    return resized(func(args[0]._local_tensor), args[0])


@operator(aten.view_as_complex.default)
def as_complex(func: Any, args: Any, kwargs: Any) -> Any:
    """The last dim, of size 2, becomes one number."""
    if not whole_dims(args[0], args[0].ndim - 1):
        return NotImplemented
    return resized(func(args[0]._local_tensor), args[0])
