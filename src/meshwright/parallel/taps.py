"""Sums over windows along one dim, and their adjoint: planes are added as a whole, in any memory order.

Window i reads positions i · stride - pad + k for k below `kernel`; what lies outside is zero. `pad` may be any integer:
the positions may be a piece of a longer line that begins before or behind the first window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def _at(x: torch.Tensor, dim: int, first: int, count: int, step: int = 1) -> torch.Tensor:
    """`count` planes of `x` along `dim` from `first` on."""
    return x[(slice(None),) * dim + (slice(first, first + (count - 1) * step + 1, step),)]


def _taps(windows: int, size: int, kernel: int, stride: int, pad: int) -> Iterator[tuple[int, int, int]]:
    """(k, first window, number of windows) of the windows whose position k lies inside."""
    for k in range(kernel):
        lo = min(windows, max(0, -((k - pad) // stride)))
        hi = max(lo, min(windows, (size - 1 - k + pad) // stride + 1))
        if hi > lo:
            yield k, lo, hi - lo


def _put(into: torch.Tensor, x: torch.Tensor, share: float) -> None:
    into.copy_(x) if share == 1 else torch.mul(x, share, out=into)


def gather(
    out: torch.Tensor, x: torch.Tensor, dim: int, kernel: int, stride: int, pad: int, share: float = 1.0
) -> None:
    """out[i] = Σ_k x[i · stride - pad + k] · share along `dim`."""
    taps = sorted(_taps(out.shape[dim], x.shape[dim], kernel, stride, pad), key=lambda tap: -tap[2])
    if not taps:
        out.zero_()
        return
    k, lo, count = taps[0]  # the one that most windows have
    out.narrow(dim, 0, lo).zero_()
    out.narrow(dim, lo + count, out.shape[dim] - lo - count).zero_()
    _put(out.narrow(dim, lo, count), _at(x, dim, lo * stride - pad + k, count, stride), share)
    for k, lo, count in taps[1:]:
        out.narrow(dim, lo, count).add_(_at(x, dim, lo * stride - pad + k, count, stride), alpha=share)


def gather_more(
    out: torch.Tensor, x: torch.Tensor, dim: int, kernel: int, stride: int, pad: int, share: float = 1.0
) -> None:
    """The same, added to `out`."""
    for k, lo, count in _taps(out.shape[dim], x.shape[dim], kernel, stride, pad):
        out.narrow(dim, lo, count).add_(_at(x, dim, lo * stride - pad + k, count, stride), alpha=share)


def spread(
    out: torch.Tensor, grad: torch.Tensor, dim: int, kernel: int, stride: int, pad: int, share: float = 1.0
) -> None:
    """out[p] = Σ grad[i] · share over all i, k with p = i · stride - pad + k: the adjoint of `gather`."""
    size, windows = out.shape[dim], grad.shape[dim]
    for phase in range(min(stride, size)):  # positions p with p % stride == phase get from the same taps
        count = (size - 1 - phase) // stride + 1
        mine, is_fresh = _at(out, dim, phase, count, stride), True
        for k in range((phase + pad) % stride, kernel, stride):
            shift = (k - pad - phase) // stride  # position number i + shift of this phase
            lo, hi = max(0, -shift), min(windows, count - shift)
            if hi <= lo:
                continue
            into, piece = mine.narrow(dim, lo + shift, hi - lo), grad.narrow(dim, lo, hi - lo)
            if is_fresh:
                mine.narrow(dim, 0, lo + shift).zero_()
                mine.narrow(dim, hi + shift, count - hi - shift).zero_()
                _put(into, piece, share)
                is_fresh = False
            else:
                into.add_(piece, alpha=share)
        if is_fresh:
            mine.zero_()
