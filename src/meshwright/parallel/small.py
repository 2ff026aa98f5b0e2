"""Vectors of a few hundred numbers: numpy's where they lie on a CPU, whose operators cost a third of torch's there.

What is written with operators alone works on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def host(t: torch.Tensor) -> Any:
    """A tensor without history as an array that shares its memory; itself on an accelerator."""
    return t.numpy() if t.device.type == "cpu" else t


def stacked(rows: Sequence[Any]) -> Any:
    """Vectors (of `host`) in fp64, one below the other."""
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(list(rows)).double()
    return np.array(rows, dtype=np.float64)


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Back again, in a floating dtype that numpy knows."""
    if isinstance(values, torch.Tensor):
        return values.to(dtype)
    return torch.from_numpy(values.astype(_DTYPES[dtype], copy=False))
