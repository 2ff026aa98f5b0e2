"""Which windows of a maximum pooling are computed again near a cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright.parallel.rules.edge_pool import MOST_EDGES, _edges
from meshwright.parallel.rules.grids import Grid
from meshwright.plan.geometry import chunks


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 2), st.integers(4, 64), st.integers(2, 5)
)
def test_parts_and_strips_are_the_whole(k: int, s: int, p: int, d: int, size: int, ranks: int) -> None:
    """Each part pooled alone, and its edges from a strip of the whole, give the outputs of the whole."""
    grid = Grid(k, s, min(p, k // 2), d)
    assume(size + 2 * grid.p >= grid.reach)
    x = torch.randn(1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    y = F.max_pool1d(x, k, s, grid.p, d)
    outs = chunks(y.shape[2], ranks)
    found = _edges(grid, size, outs)
    assume(found is not None)
    assert found is not None
    for own, out, (pad, edges) in zip(chunks(size, ranks), outs, found, strict=True):
        mine = F.max_pool1d(x[:, :, own.lo : own.hi], k, s, pad, d)
        for edge in edges:
            strip = x[:, :, own.lo + edge.reads.lo : own.lo + edge.reads.hi]
            mine[:, :, edge.outs.lo : edge.outs.hi] = F.max_pool1d(strip, k, s, 0, d)
        assert torch.equal(mine, y[:, :, out.lo : out.hi])
        assert sum(edge.outs.size for edge in edges) <= MOST_EDGES


def test_where_it_applies() -> None:
    """The stem of a residual net; not where the windows of a part do not start with it, or too few are left."""
    assert _edges(Grid(3, 2, 1, 1), 256, chunks(128, 2)) == ((1, ()), (1, (((0, 1), (-1, 2)),)))
    assert _edges(Grid(5, 1, 2, 1), 8, chunks(8, 4)) is None
    assert _edges(Grid(2, 2, 0, 1), 66, chunks(33, 4)) is None
