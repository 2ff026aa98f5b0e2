"""Fractional maximum pooling: its windows are drawn at random for each sample and channel, alike on all ranks.

A window may begin anywhere, so space is gathered (reported, or refused under `strict`); samples stay split. The draws
come from the library's own streams, as those of dropout do: one rank under `parallelize` is the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.parallel.functions import as_mesh, function, gathered
from meshwright.parallel.layout import replicated
from meshwright.parallel.parts import to_local
from meshwright.parallel.redistribute import redistribute
from meshwright.parallel.rules.windows import enter, nothing
from meshwright.parallel.tensor import wrap

_POOL: dict[int, Any] = {2: F.fractional_max_pool2d, 3: F.fractional_max_pool3d}


def fractional_max_pool(
    n: int,
    input: Any,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Any = None,
) -> Any:
    """[N, C, *space] → [N, C, *out], with raster positions in the whole space where asked for."""
    options = {"output_size": output_size, "output_ratio": output_ratio, "return_indices": return_indices}
    if input.ndim == n + 1:
        out = fractional_max_pool(n, input.unsqueeze(0), kernel_size, **options, _random_samples=_random_samples)
        return (out[0].squeeze(0), out[1].squeeze(0)) if return_indices else out.squeeze(0)
    x, mesh = gathered(input, range(1, n + 2), "fractional_max_pool"), input._spec.mesh
    if _random_samples is None:
        draws = torch.empty((*x.shape[:2], n), dtype=x.dtype, device=x.device)
        _random_samples = wrap(draws, mesh, replicated(mesh), None, x._ledger).uniform_()
    space, local = enter(x, "fractional_max_pool")
    samples = to_local(redistribute(as_mesh(_random_samples, mesh), space.placements, space.cause))
    one = _POOL[n](
        torch.zeros((1, 1, *x.shape[2:])),
        kernel_size,
        output_size,
        output_ratio,
        _random_samples=torch.zeros((1, 1, n)),
    )
    out_shape = (*x.shape[:2], *one.shape[2:])
    target = space.local_shape(out_shape)
    if 0 in target:
        y = nothing(local, target, lambda v: _POOL[n](v, 1, 1, _random_samples=v.new_zeros((1, 1, n))))
        index = torch.empty(target, dtype=torch.int64, device=local.device)
    else:
        y, index = _POOL[n](local, kernel_size, output_size, output_ratio, True, _random_samples=samples)
    pooled = space.done(y, out_shape)
    if not return_indices:
        return pooled
    return pooled, wrap(index, mesh, space.placements, out_shape, space.cause.ledger)


def _with_indices(n: int, *args: Any, **kwargs: Any) -> Any:
    """The forms that always return indices."""
    return fractional_max_pool(n, *args, **{**kwargs, "return_indices": True})


function(F.fractional_max_pool2d)(partial(fractional_max_pool, 2))
function(F.fractional_max_pool3d)(partial(fractional_max_pool, 3))
function(F.fractional_max_pool2d_with_indices)(partial(_with_indices, 2))
function(F.fractional_max_pool3d_with_indices)(partial(_with_indices, 3))
