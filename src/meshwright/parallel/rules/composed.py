"""Functions of torch that are others with rules, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.parallel.functions import function


@function(torch.rot90, torch.Tensor.rot90)
def rot90(input: Any, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    """Quarter turns in the plane of two dims: a flip and a transposition, which renumbers the splits."""
    first, second = dims
    turns = k % 4
    if len({first % input.ndim, second % input.ndim}) != 2:
        return NotImplemented
    if turns == 0:
        return input.clone()
    if turns == 2:
        return input.flip((first, second))
    if turns == 1:
        return input.flip((second,)).transpose(first, second)
    return input.flip((first,)).transpose(first, second)


@function(torch.dist, torch.Tensor.dist)
def dist(input: Any, other: Any, p: float = 2) -> Any:
    """The norm of a difference."""
    return torch.linalg.vector_norm(input - other, p)


@function(torch.addbmm, torch.Tensor.addbmm)
def addbmm(input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    """Products of a batch, added up."""
    if out is not None or beta == 0:
        return NotImplemented
    total = torch.bmm(batch1, batch2).sum(0)
    return (input if beta == 1 else input * beta) + (total if alpha == 1 else total * alpha)
