"""Sums over windows along one dim, of a whole line and of pieces of it, and their adjoint."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel.taps import gather, gather_more, spread

SIZES = st.integers(0, 9)


def _truth(x: torch.Tensor, windows: int, kernel: int, stride: int, pad: int) -> torch.Tensor:
    """Position by position along dim 1."""
    out = x.new_zeros(x.shape[0], windows, x.shape[2])
    for i in range(windows):
        for k in range(kernel):
            if 0 <= i * stride - pad + k < x.shape[1]:
                out[:, i] += x[:, i * stride - pad + k]
    return out


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(-6, 9), st.sampled_from([1.0, 0.25]))
def test_windows_of_a_line(size: int, windows: int, kernel: int, stride: int, pad: int, share: float) -> None:
    """Whatever was in the memory before; the adjoint has the same inner product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    out, truth = x.new_full((2, windows, 3), torch.nan), _truth(x, windows, kernel, stride, pad) * share
    gather(out, x, 1, kernel, stride, pad, share)
    torch.testing.assert_close(out, truth)
    more = torch.ones_like(out)
    gather_more(more, x, 1, kernel, stride, pad, share)
    torch.testing.assert_close(more, truth + 1)
    grad = torch.randn(2, windows, 3, generator=generator, dtype=torch.float64)
    back = torch.full_like(x, torch.nan)
    spread(back, grad, 1, kernel, stride, pad, share)
    torch.testing.assert_close((back * x).sum(), (grad * out).sum())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_pieces_of_a_line(size: int, at: int, kernel: int, stride: int, pad: int) -> None:
    """The later a piece begins, the further the first window lies before it; in any memory order."""
    x = torch.randn(1, 4, size, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, at = x.contiguous(memory_format=torch.channels_last_3d), min(at, size)
    windows = (size + 2 * pad) // stride + 1
    whole, parts = (torch.empty(1, 4, windows, 3, 2, dtype=torch.float64) for _ in range(2))
    gather(whole, x, 2, kernel, stride, pad)
    gather(parts, x[:, :, :at], 2, kernel, stride, pad)
    gather_more(parts, x[:, :, at:], 2, kernel, stride, pad + at)
    torch.testing.assert_close(parts, whole)
