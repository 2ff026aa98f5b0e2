"""Which windows of a maximum pooling are computed again near a cut."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from meshwright.parallel.rules.edge_pool import MOST_EDGES, _edges
from meshwright.parallel.rules.grids import Grid
from meshwright.plan.geometry import chunks


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_parts_and_strips_are_the_whole(ranks: int) -> None:
    """Each part pooled alone, and its edges from a strip of the whole, give the outputs of the whole: every kernel,
    stride, padding and dilation up to a size."""
    applied = 0
    for k, s, p, d, size in itertools.product(range(1, 6), range(1, 5), range(3), (1, 2), range(4, 65)):
        if p <= k // 2 and size + 2 * p >= d * (k - 1) + 1:
            applied += _check(Grid(k, s, p, d), size, ranks)
    assert applied >= 600


def _check(grid: Grid, size: int, ranks: int) -> bool:
    """Whether the pooling is one of parts and strips; if so, it is right."""
    k, s, d = grid.k, grid.s, grid.d
    x = torch.randn(1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    y = F.max_pool1d(x, k, s, grid.p, d)
    outs = chunks(y.shape[2], ranks)
    found = _edges(grid, size, outs)
    if found is None:
        return False
    for own, out, (pad, edges) in zip(chunks(size, ranks), outs, found, strict=True):
        mine = F.max_pool1d(x[:, :, own.lo : own.hi], k, s, pad, d)
        for edge in edges:
            strip = x[:, :, own.lo + edge.reads.lo : own.lo + edge.reads.hi]
            mine[:, :, edge.outs.lo : edge.outs.hi] = F.max_pool1d(strip, k, s, 0, d)
        assert torch.equal(mine, y[:, :, out.lo : out.hi])
        assert sum(edge.outs.size for edge in edges) <= MOST_EDGES
    return True


def test_where_it_applies() -> None:
    """The stem of a residual net; not where the windows of a part do not start with it, or too few are left."""
    assert _edges(Grid(3, 2, 1, 1), 256, chunks(128, 2)) == ((1, ()), (1, (((0, 1), (-1, 2)),)))
    assert _edges(Grid(5, 1, 2, 1), 8, chunks(8, 4)) is None
    assert _edges(Grid(2, 2, 0, 1), 66, chunks(33, 4)) is None
