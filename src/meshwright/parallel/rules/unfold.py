"""Windows as a dim of their own: `Tensor.unfold`, and `F.unfold` / `F.fold` made of it.

Along a split dim each rank fetches the positions that its windows read; the gradient sends them home and adds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

from meshwright.parallel.exchange import Fetch, Line, Return
from meshwright.parallel.functions import cause_for, function, placements_of, tuple_of
from meshwright.parallel.layout import REPLICATE, axis_of, local_shape, with_axis
from meshwright.parallel.mesh import sizes
from meshwright.parallel.operators import cause_of, operator
from meshwright.parallel.redistribute import redistribute
from meshwright.parallel.rules.common import parts
from meshwright.parallel.tensor import is_mesh, wrap
from meshwright.plan.geometry import Interval, chunks

aten = torch.ops.aten


def _windows(count: int, size: int, step: int, ranks: int) -> tuple[Interval, ...]:
    """The positions that the windows of each rank read."""
    return tuple(
        Interval(c.lo * step, (c.hi - 1) * step + size) if c.size else Interval(0, 0) for c in chunks(count, ranks)
    )


@operator(aten.unfold.default)
def unfold(func: Any, args: Any, kwargs: Any) -> Any:
    """[..., n, ...] → [..., windows, ..., size]: window w reads positions w·step … w·step + size − 1."""
    x, size, step = args[0], args[2], args[3]
    mesh, placements, shape = parts(x)
    if not shape:
        return NotImplemented
    dim = args[1] % len(shape)
    axis, local = axis_of(placements, dim), x._local_tensor
    if not 0 < size <= shape[dim] or step < 1:
        raise RuntimeError(
            f"unfold: windows of {size} with step {step} do not fit dim {dim} of {shape}; "
            "sizes from 1 to the size of the dim and steps from 1 are possible"
        )
    count = (shape[dim] - size) // step + 1
    new = (*shape[:dim], count, *shape[dim + 1 :], size)
    if axis is None:
        return wrap(func(local, dim, size, step), mesh, placements, new, x._ledger)
    line = Line(mesh, axis, dim, cause_of(func, args))
    wanted = _windows(count, size, step, line.ranks)
    local = Fetch.apply(local, chunks(shape[dim], line.ranks), wanted, line)
    out = func(local, dim, size, step) if wanted[line.me].size else local.new_empty(local_shape(mesh, placements, new))
    return wrap(out, mesh, placements, new, x._ledger, frozen_view=True)


@operator(aten.unfold_backward.default)
def unfold_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Every window adds to the positions that it read."""
    grad, shape, dim, size, step = args
    mesh, placements, _ = parts(grad)
    shape = tuple(shape)
    dim %= len(shape)
    local, axis = list(local_shape(mesh, placements, shape)), axis_of(placements, dim)
    if axis_of(placements, len(shape)) is not None:
        return NotImplemented
    if axis is None:
        return wrap(func(grad._local_tensor, local, dim, size, step), mesh, placements, shape, grad._ledger)
    line = Line(mesh, axis, dim, cause_of(func, args))
    wanted = _windows(grad._spec.shape[dim], size, step, sizes(mesh)[axis])
    local[dim] = wanted[line.me].size
    mine = func(grad._local_tensor, local, dim, size, step) if local[dim] else grad._local_tensor.new_zeros(local)
    out = Return.apply(mine, chunks(shape[dim], line.ranks), wanted, line)
    return wrap(out, mesh, placements, shape, grad._ledger)


def _rows_first(x: Any) -> Any:
    """Windows are numbered row by row, so a split of columns moves (all-to-all) before the kernel multiplies the data:
    to the rows, or to the channels where the rows are split too."""
    placements = placements_of(x)
    axis = axis_of(placements, 3)
    if axis is None:
        return x
    free = next((dim for dim in (2, 1, 0) if axis_of(placements, dim) is None and x.shape[dim] > 1), None)
    target = REPLICATE if free is None else Shard(free)
    return redistribute(x, with_axis(placements, axis, target), cause_for("unfold", x))


@function(F.unfold)
def columns(input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    """[N, C, H, W] → [N, C·kh·kw, windows], as padding, two `unfold`s and a reshape."""
    if not is_mesh(input) or input.ndim != 4:
        return NotImplemented
    k, d, p, s = (tuple_of(v, 2) for v in (kernel_size, dilation, padding, stride))
    if min(k + d + s) < 1 or min(p) < 0:
        return NotImplemented
    x = _rows_first(input)
    x = F.pad(x, (p[1], p[1], p[0], p[0])) if any(p) else x
    for i in (0, 1):
        x = x.unfold(2 + i, d[i] * (k[i] - 1) + 1, s[i])
    x = x[..., :: d[0], :: d[1]]  # [N, C, h, w, kh, kw]
    n, c, h, w = x.shape[:4]
    return x.permute(0, 1, 4, 5, 2, 3).reshape(n, c * k[0] * k[1], h * w)


@function(F.fold)
def from_columns(
    input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Any:
    """[N, C·kh·kw, windows] → [N, C, H, W]: overlapping windows are added up."""
    if not is_mesh(input) or input.ndim != 3:
        return NotImplemented
    size, k, d, p, s = (tuple_of(v, 2) for v in (output_size, kernel_size, dilation, padding, stride))
    if d != (1, 1) or min(k + s) < 1 or min(p) < 0:
        return NotImplemented
    n, c = input.shape[0], input.shape[1] // (k[0] * k[1])
    full = [size[i] + 2 * p[i] for i in (0, 1)]
    count = [(full[i] - k[i]) // s[i] + 1 for i in (0, 1)]
    if input.shape[1] % (k[0] * k[1]) or count[0] * count[1] != input.shape[2]:
        return NotImplemented
    x = input.reshape(n, c, *k, *count).permute(0, 1, 4, 5, 2, 3)  # [N, C, h, w, kh, kw]
    x = aten.unfold_backward(x, [n, c, count[0], full[1], k[0]], 3, k[1], s[1])
    x = aten.unfold_backward(x, [n, c, *full], 2, k[0], s[0])
    return x[:, :, p[0] : p[0] + size[0], p[1] : p[1] + size[1]]
